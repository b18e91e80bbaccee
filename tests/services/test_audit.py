"""What is written down, with what it describes; and that the database lets nobody change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.db import Error, connection, transaction

from orkestr_console.accounts import audit, limit_changes
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limit_changes import LimitsSpec
from orkestr_console.accounts.models import AuditEntry, Outcome
from orkestr_console.accounts.services import user_actor
from orkestr_console.core.errors import DomainError, NotFound
from sandboxes_app import services as sandboxes
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import (
    BackgroundSpec,
    BatchSpec,
    CodeSpec,
    ContextSpec,
    DirectorySpec,
    ExecSpec,
    FileSpec,
    MoveSpec,
    SandboxSpec,
    TimeoutSpec,
)
from templates_app import services as templates
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost

TEMPLATE = TemplateSpec(name="tools", base_template="debian-12", recipe=["true"])
FILE = FileSpec(path="/workspace/a", content="eA==")

type Write = Callable[[Actor, str], Any]

# Action, and the service that does it to a sandbox.
ON_A_SANDBOX: list[tuple[str, Write]] = [
    ("sandbox.exec", lambda a, s: sandboxes.exec_command(a, s, ExecSpec(command="true"))),
    ("sandbox.exec", lambda a, s: sandboxes.exec_stream(a, s, ExecSpec(command="true"))),
    ("command.start", lambda a, s: sandboxes.start_command(a, s, BackgroundSpec(command="true"))),
    ("sandbox.run_code", lambda a, s: sandboxes.code_stream(a, s, CodeSpec(code="1"))),
    ("context.create", lambda a, s: sandboxes.create_context(a, s, ContextSpec())),
    ("sandbox.timeout", lambda a, s: sandboxes.set_timeout(a, s, TimeoutSpec(timeout_seconds=60))),
    ("file.write", lambda a, s: sandboxes.write_file(a, s, FILE)),
    ("file.write", lambda a, s: sandboxes.write_batch(a, s, BatchSpec(files=[FILE]))),
    ("file.mkdir", lambda a, s: sandboxes.mkdir(a, s, DirectorySpec(path="/workspace/d"))),
    ("sandbox.pause", lambda a, s: sandboxes.pause_sandbox(a, s)),
    ("sandbox.terminate", lambda a, s: sandboxes.terminate_sandbox(a, s)),
]


@pytest.fixture
def sandbox(host: FakeHost, actor: Actor) -> Sandbox:
    return sandboxes.create_sandbox(actor, SandboxSpec(template="debian-12"))


def last() -> AuditEntry:
    entry = AuditEntry.objects.first()
    assert entry is not None
    return entry


@pytest.mark.parametrize(("action", "write"), ON_A_SANDBOX)
def test_a_write_to_a_sandbox_is_on_record(
    actor: Actor, sandbox: Sandbox, action: str, write: Write
) -> None:
    before = AuditEntry.objects.count()
    write(actor, sandbox.pk)
    assert AuditEntry.objects.count() == before + 1
    entry = last()
    assert (entry.action, entry.outcome) == (action, Outcome.DONE)
    assert (entry.object_id, entry.team_id) == (sandbox.pk, actor.team.pk)
    assert actor.token is not None
    assert (entry.token, entry.surface) == (actor.token.prefix, "rest")
    assert entry.address == "192.0.2.1"


@pytest.mark.parametrize(("action", "write"), ON_A_SANDBOX)
def test_a_refused_write_is_on_record_with_its_reason(
    other_actor: Actor, sandbox: Sandbox, action: str, write: Write
) -> None:
    with pytest.raises(NotFound):
        write(other_actor, sandbox.pk)
    entry = last()
    assert (entry.action, entry.outcome) == (action, Outcome.DENIED)
    assert (entry.team_id, entry.code) == (other_actor.team.pk, "not_found")
    assert entry.detail


def test_files_moved_and_deleted_are_on_record(actor: Actor, sandbox: Sandbox) -> None:
    sandboxes.write_file(actor, sandbox.pk, FILE)
    move = MoveSpec(source="/workspace/a", destination="/workspace/b")
    sandboxes.move(actor, sandbox.pk, move)
    assert last().data == {"path": "/workspace/a", "to": "/workspace/b"}
    sandboxes.delete_path(actor, sandbox.pk, "/workspace/b")
    assert (last().action, last().data) == ("file.delete", {"path": "/workspace/b"})


def test_a_command_is_not_written_down_for_it_may_hold_secrets(
    actor: Actor, sandbox: Sandbox
) -> None:
    sandboxes.exec_command(actor, sandbox.pk, ExecSpec(command="echo hunter2"))
    assert "hunter2" not in str(last().data)
    assert last().data["exit_code"] == 0


def test_a_background_command_is_on_record_by_its_id_alone(
    actor: Actor, other_actor: Actor, sandbox: Sandbox
) -> None:
    spec = BackgroundSpec(command="echo hunter2", env={"A": "hunter2"})
    command = sandboxes.start_command(actor, sandbox.pk, spec)
    assert (last().action, last().data) == ("command.start", {"command": command.id})
    sandboxes.kill_command(actor, sandbox.pk, command.id)
    assert (last().action, last().data) == ("command.kill", {"command": command.id})
    with pytest.raises(NotFound):
        sandboxes.kill_command(other_actor, sandbox.pk, command.id)
    assert (last().action, last().outcome) == ("command.kill", Outcome.DENIED)


def test_templates_made_and_deleted_are_on_record(host: FakeHost, actor: Actor) -> None:
    template = templates.create_template(actor, TEMPLATE)
    assert (last().action, last().object_id, last().object_name) == (
        "template.create",
        template.pk,
        "tools",
    )
    templates.delete_template(actor, template.pk)
    assert (last().action, last().object_name) == ("template.delete", "tools")


def test_an_entry_is_there_exactly_if_what_it_describes_is(console_actor: Actor) -> None:
    with pytest.raises(ZeroDivisionError), transaction.atomic():
        limit_changes.set_team_limits(console_actor, LimitsSpec())
        raise ZeroDivisionError
    assert not AuditEntry.objects.exists()


def test_the_systems_failure_is_no_refusal(host: FakeHost, actor: Actor) -> None:
    host.down = True
    with pytest.raises(DomainError):
        sandboxes.create_sandbox(actor, SandboxSpec(template="debian-12"))
    assert not AuditEntry.objects.filter(outcome=Outcome.DENIED).exists()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE accounts_auditentry SET who = 'nobody'",
        "DELETE FROM accounts_auditentry",
        "TRUNCATE accounts_auditentry",
    ],
)
def test_the_database_refuses_every_change(console_actor: Actor, statement: str) -> None:
    audit.record(console_actor, "test.write")
    with connection.cursor() as cursor:
        # As everywhere but in tests.
        cursor.execute("SET LOCAL orkestr.truncates_audit = off")
        with pytest.raises(Error, match="append-only"), transaction.atomic():
            cursor.execute(statement)
    assert AuditEntry.objects.get().who == "alice@example.org"


def test_entries_outlive_who_made_them(console_actor: Actor, host: FakeHost) -> None:
    templates.create_template(console_actor, TEMPLATE)
    assert console_actor.user is not None
    console_actor.user.delete()
    assert last().who == "alice@example.org"


def test_a_sign_in_is_on_record_in_each_of_the_persons_teams(console_actor: Actor) -> None:
    user = console_actor.user
    assert user is not None
    assert user_actor(user, None, None).team == console_actor.team
    audit.record_sign_in(user.email, "192.0.2.7", console_actor.team.pk, user=user)
    assert (last().action, last().outcome, last().address) == (
        "session.create",
        Outcome.DONE,
        "192.0.2.7",
    )
