"""Templates by name, and by the packages in their images."""

from __future__ import annotations

import json
from dataclasses import dataclass

from django.db import connection

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.errors import Conflict, InvalidInput, NotFound
from orkestr_console.core.hosts import Steps, ask, in_steps
from orkestr_console.core.ids import is_id
from orkestr_console.core.rows import quoted
from orkestr_console.core.text import shorten_list
from orkestr_console.http.paging import page
from templates_app.models import Template, TemplateStatus
from templates_app.services.bases import ALIASES, TEMPLATE_ID_PREFIX
from templates_app.services.templates import NOT_FOUND

# In how many templates one call looks: each lists up to some thousands of packages.
SEARCHED = 100
MAX_PACKAGE_LENGTH = 200
MAX_SHOWN = 5
# One statement for all of a page: what is in an image stays in the database.
PACKAGES_SQL = """
SELECT id, manager.key, jsonb_path_query_array(
    manager.value, 'strict $[*] ? (@[0] == $names[*])',
    jsonb_build_object('names', %(names)s::jsonb)
) FROM {table}, jsonb_each(contents->'packages') AS manager
WHERE id = ANY(%(ids)s) AND jsonb_typeof(contents->'packages') = 'object'
"""


@dataclass(frozen=True)
class Found:
    """A template, and what it has of a package: manager, name and version of each."""

    template: Template
    packages: list[tuple[str, str, str]]


def template_id(actor: Actor, reference: str) -> str:
    """The id of the template with an id or a name.

    A failed one only if no other has the name. Raises ``NotFound``, and ``Conflict`` if several do.
    """
    actor.require(READ)
    if is_id("tmpl", reference):
        return reference
    if (found := named(actor, reference)) is None:
        raise NotFound(NOT_FOUND)
    return found


def named(actor: Actor, name: str) -> str | None:
    """The id of the template with a name, or None. Raises ``Conflict`` if several have it."""
    rows = Template.objects.for_team(actor.team).filter(name=name).order_by("-created_at")
    known = [
        list(some.values_list("pk", flat=True)[: MAX_SHOWN + 1])
        for some in (rows.using_slots(), rows.filter(status=TemplateStatus.FAILED))
    ]
    ids = known[0] or known[1]
    if len(ids) > 1:
        raise Conflict(
            f"Several templates are called {name!r}: {shorten_list(ids)}; use an id.",
            code="ambiguous",
        )
    return ids[0] if ids else None


@in_steps
def source_name(actor: Actor, reference: str) -> Steps[str]:
    """What to start from: a template's id for its name; a base's name, which comes first, as it is.

    Raises ``Conflict`` if several templates have the name.
    """
    actor.require(READ)
    if reference.startswith(TEMPLATE_ID_PREFIX) or reference in ALIASES:
        return reference
    rows = Template.objects.for_team(actor.team).filter(name=reference)
    if not rows.exists():
        return reference
    try:
        bases = yield from ask(HostClient.bases)
    except HostError:
        bases = []
    if any(base.name == reference for base in bases):
        return reference
    return named(actor, reference) or reference


def find_templates(
    actor: Actor, package: str, *, cursor: str | None = None
) -> tuple[list[Found], str | None]:
    """The ready templates that have a package, newest first, among the next hundred.

    The cursor continues after those, and is None at the end. Raises ``InvalidInput``.
    """
    actor.require(READ)
    if not package.strip() or len(package) > MAX_PACKAGE_LENGTH:
        problem = f"must be a package's name of at most {MAX_PACKAGE_LENGTH} characters."
        raise InvalidInput(f"package: {problem}", fields={"package": problem})
    ready = Template.objects.for_team(actor.team).ready().defer("contents", "recipe", "env")
    rows, next_cursor = page(ready, SEARCHED, cursor)
    packages = matching(rows, spellings(package.strip()))
    return [Found(row, packages[row.pk]) for row in rows if row.pk in packages], next_cursor


def matching(rows: list[Template], names: list[str]) -> dict[str, list[tuple[str, str, str]]]:
    """What these templates have of packages with one of these names, by id."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    with connection.cursor() as cursor:
        cursor.execute(
            PACKAGES_SQL.format(table=quoted(Template._meta.db_table)),
            {"names": json.dumps(names), "ids": [row.pk for row in rows]},
        )
        for key, manager, packages in cursor.fetchall():
            parsed = json.loads(packages) if isinstance(packages, str) else packages
            for name, version in parsed:
                found.setdefault(key, []).append((manager, str(name), str(version)))
    return found


def spellings(name: str) -> list[str]:
    """How a package may be written: managers treat some names as equal (PEP 503)."""
    lower = name.lower()
    return sorted({name, lower, lower.replace("_", "-"), lower.replace("-", "_")})
