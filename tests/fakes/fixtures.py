"""Fixtures of the fake host. A conftest takes part by importing ``host``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
from django.apps import apps
from django.test import Client
from django_q.models import OrmQ

from orkestr_console.core import hosts
from orkestr_console.queue import driving
from orkestr_console.webhooks import sender
from sandboxes_app.services import settling
from templates_app.models import Template
from templates_app.services import driver
from tests.fakes.host import FakeHost


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """A host in memory in place of the agent, for every service."""
    fake = FakeHost()
    monkeypatch.setattr(settling, "ORPHAN_GRACE_SECONDS", 0.0)
    # No connection stays after a test: the database is dropped after the last.
    monkeypatch.setattr(driving, "LINGER_SECONDS", 0.0)
    # A build is over when its task is.
    monkeypatch.setattr(driver, "run_in_background", lambda work: work())
    # And deliveries have been sent when theirs is.
    monkeypatch.setattr(sender, "run_in_background", lambda work: work())
    monkeypatch.setattr(hosts, "host_client", lambda socket: fake)
    monkeypatch.setattr(hosts, "async_host_client", lambda socket: fake)
    return fake


@pytest.fixture
def plans(transactional_db: None) -> None:
    """The plans, which a test that commits takes away from the next one when it is cleaned up."""
    migrations = "orkestr_console.accounts.migrations"
    import_module(f"{migrations}.0002_plans").add_plans(apps, None)
    import_module(f"{migrations}.0004_append_only_and_plans").add_numbers(apps, None)
    import_module(f"{migrations}.0005_commands_at_once").add_commands(apps, None)
    import_module(f"{migrations}.0007_webhooks").add_webhooks(apps, None)
    import_module(f"{migrations}.0010_snapshot_disk").add_numbers(apps, None)
    import_module(f"{migrations}.0011_volume_disk").add_numbers(apps, None)


def queued() -> list[str]:
    """The functions that wait in the queue, by name, in order."""
    return [row.task["func"] for row in OrmQ.objects.order_by("id")]


def run_queue() -> None:
    """Do what a worker does, until nothing waits."""
    while (row := OrmQ.objects.order_by("id").first()) is not None:
        task = row.task
        row.delete()
        module, _, name = task["func"].rpartition(".")
        getattr(import_module(module), name)(*task["args"], **task["kwargs"])


type MakeTemplate = Callable[..., Template]


@pytest.fixture
def make_template(api: Client, host: FakeHost) -> MakeTemplate:
    """Makes a template of Acme through REST and builds it: ``make_template(name=…)``."""

    def make(**changes: object) -> Template:
        body = {"name": "tools", "base_template": "debian-12", "recipe": ["true"], **changes}
        answer = api.post("/v1/templates", body, content_type="application/json")
        assert answer.status_code == 201, answer.content
        run_queue()
        return Template.objects.get(pk=answer.json()["id"])

    return make
