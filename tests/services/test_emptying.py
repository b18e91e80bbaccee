"""What a test commits is gone for the next one, to the last row."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import Permission
from django.contrib.contenttypes.models import ContentType
from django.db import connection

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry, Plan
from sandboxes_app import services
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import SandboxSpec
from tests.emptying import RETAINED_TABLES, empty_tables
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.django_db(transaction=True)


def rows() -> dict[str, int]:
    """How many rows each table of a model's has, where there are any."""
    names = connection.introspection.django_table_names(only_existing=True)
    with connection.cursor() as cursor:
        found = {}
        for name in names:
            cursor.execute(f'SELECT count(*) FROM "{name}"')
            if count := cursor.fetchone()[0]:
                found[name] = count
    return found


def test_every_table_is_emptied_and_what_follows_from_the_models_is_kept(
    host: FakeHost, plans: None, actor: Actor
) -> None:
    services.create_sandbox(actor, SandboxSpec(template="debian-12"))
    assert Plan.objects.exists() and Sandbox.objects.exists() and AuditEntry.objects.exists()
    before = rows()
    empty_tables()
    assert rows() == {name: count for name, count in before.items() if name in RETAINED_TABLES}
    assert ContentType.objects.exists() and Permission.objects.exists()
    # Once more, with nothing to do.
    empty_tables()
