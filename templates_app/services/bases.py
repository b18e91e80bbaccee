"""What a template or sandbox can start from: a built-in base, or a ready template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.errors import ImageNotFound as NoImage
from hostruntime.wire.images import BaseInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import Conflict, HostUnavailable, InvalidInput, NotFound
from orkestr_console.core.hosts import Steps, ask, host, in_steps, translated_errors
from orkestr_console.core.ids import is_id
from templates_app.models import Template, TemplateStatus

# Names that clients still send, and what they stand for now.
ALIASES = {"ubuntu-24.04": "debian-12"}
TEMPLATE_ID_PREFIX = "tmpl_"


@dataclass(frozen=True)
class BaseChoice:
    """One entry of the picker; one that is not ``available`` is still being created on the host."""

    id: str
    title: str
    description: str
    group: Literal["builtin", "team"]
    available: bool

    @property
    def label(self) -> str:
        """The title, and the id if it differs: ``Ubuntu 24.04 (ubuntu-24.04)``."""
        return self.title if self.title == self.id else f"{self.title} ({self.id})"


@dataclass(frozen=True)
class Source:
    """What a name refers to: ``image_id`` on the host, ``name`` for people, ``id`` as requested.

    ``env`` is the environment baked into the image, as far as it is known here.
    """

    id: str
    name: str
    image_id: str
    env: Mapping[str, str] = field(default_factory=dict)


def list_bases(actor: Actor) -> list[BaseChoice]:
    """The built-in bases and the team's ready templates, newest first.

    If the host doesn't answer, the built-in ones are left out, so that the page still works.
    """
    try:
        known = host().bases()
    except HostError:
        known = []
    built_in = [
        BaseChoice(base.name, base.title, base.description, "builtin", base.state == "ready")
        for base in known
    ]
    rows = Template.objects.for_team(actor.team).ready().order_by("-created_at", "-pk")
    # What is in an image may be megabytes.
    rows = rows.only("pk", "name", "base_template")
    own = [
        BaseChoice(row.pk, row.name, f"on {row.base_template}", "team", available=True)
        for row in rows
    ]
    return [*built_in, *own]


@in_steps
def resolve(team: Team, name: str, *, field: str) -> Steps[Source]:
    """The image behind a base's name or a template's id.

    Raises ``InvalidInput`` naming ``field`` for an unknown built-in, ``NotFound`` for a template
    that is not the team's, ``Conflict`` for one that is not ready, ``HostUnavailable``.
    """
    if name.startswith(TEMPLATE_ID_PREFIX):
        return team_template(team, name)
    base = ALIASES.get(name, name)
    with translated_errors():
        known = {info.name: info for info in (yield from ask(HostClient.bases))}
    if base not in known:
        raise unknown_base(name, known, field)
    if (state := known[base].state) != "ready":
        problem = "could not be created" if state == "failed" else "is not made"
        raise HostUnavailable(
            f"The base image '{base}' {problem} on this host yet, which is tried by itself; try "
            "again in a minute, or ask your operator: the host agent's log says why.",
            retry_after=30,
        )
    return Source(name, base, base)


def team_template(team: Team, template_id: str) -> Source:
    """The image of one of the team's own templates. Raises ``NotFound`` or ``Conflict``."""
    row = (
        Template.objects.for_team(team).filter(pk=template_id).first()
        if is_id("tmpl", template_id)
        else None
    )
    if row is None:
        raise NotFound(f"There is no template {template_id!r} in your team; check the id.")
    if row.status == TemplateStatus.BUILDING:
        raise Conflict(
            f"Template '{row.name}' is still building; wait for it to be ready.",
            code="template_not_ready",
        )
    if row.status == TemplateStatus.FAILED:
        raise Conflict(
            f"The build of template '{row.name}' failed, so there is nothing to start; look at "
            "its error and build a new one.",
            code="template_not_ready",
        )
    return Source(row.pk, row.name, row.image_id, row.baked_env or row.env)


def unknown_base(name: str, known: dict[str, BaseInfo], field: str) -> InvalidInput:
    """The error for an unknown name, with the names that exist."""
    shown = name if len(name) <= 64 else f"{name[:64]}…"
    names = ", ".join(known) or "none yet"
    sentence = f"{shown!r} is not a base image here; there are {names}, and your own templates."
    return InvalidInput(f"{field}: {sentence}", fields={field: sentence})


def reclaimable_bytes(template: Template) -> int | None:
    """The bytes of disk that deleting a template frees; None if the host doesn't answer.

    What its image shares with others is not freed.
    """
    try:
        return host().image_usage(template.image_id).reclaimable_bytes
    except NoImage:
        return 0
    except HostError:
        return None
