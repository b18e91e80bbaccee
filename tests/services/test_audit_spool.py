"""Audit entries that are written behind their answer: all of them, once, whatever happens."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from django.db import DataError, OperationalError
from psycopg.errors import AdminShutdown

from orkestr_console.accounts import audit_spool
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.audit import entry
from orkestr_console.accounts.audit_spool import AuditSpool, encode
from orkestr_console.accounts.models import AuditEntry
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import ExecSpec, SandboxSpec
from tests.fakes.host import FakeHost
from tests.stack import wait_for

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[AuditSpool]:
    made = AuditSpool(tmp_path)
    yield made
    if made._writer.is_alive():
        made.close()


@pytest.fixture
def made(actor: Actor) -> Callable[[int], AuditEntry]:
    def make(number: int) -> AuditEntry:
        # In the order in which PostgreSQL returns them (jsonb).
        data = {"text": 'ü"\n\u2028', "exit_code": number}
        return entry(actor, "sandbox.exec", kind="sandbox", object_id=f"sbx_{number}", data=data)

    return make


def written() -> list[str]:
    return sorted(AuditEntry.objects.values_list("object_id", flat=True))


def kept(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in directory.iterdir() if path.read_bytes()]


def test_a_commands_entry_is_written_behind_its_answer(
    actor: Actor, host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = sandboxes.create_sandbox(actor, SandboxSpec(template="debian-12"))
    before = AuditEntry.objects.count()
    monkeypatch.setattr(audit_spool, "_spool", AuditSpool(tmp_path))
    sandboxes.exec_command(actor, sandbox.pk, ExecSpec(command="true"))
    assert AuditEntry.objects.count() == before
    assert len(kept(tmp_path)) == 1
    spool = audit_spool._spool
    assert spool is not None
    spool.start()
    wait_for(lambda: AuditEntry.objects.count() == before + 1, 30)
    recorded = AuditEntry.objects.latest("id")
    assert (recorded.action, recorded.object_id) == ("sandbox.exec", sandbox.pk)
    audit_spool.stop()
    assert list(tmp_path.iterdir()) == []


def test_all_is_written_in_order_and_as_it_was(
    spool: AuditSpool, made: Callable[[int], AuditEntry], tmp_path: Path
) -> None:
    spool.start()
    entries = [made(number) for number in range(200)]
    assert all(spool.keep(each) for each in entries)
    spool.close()
    found = list(AuditEntry.objects.order_by("id"))
    assert list(map(encode, found)) == list(map(encode, entries))
    assert list(tmp_path.iterdir()) == []
    assert not spool.keep(made(1)), "whoever comes later writes it"


def test_while_the_database_is_away_entries_wait(
    spool: AuditSpool, made: Callable[[int], AuditEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OperationalError("gone")] * 3
    for each in failures:
        each.__cause__ = AdminShutdown()
    real = AuditEntry.objects.bulk_create

    def failing(entries: list[AuditEntry]) -> object:
        if failures:
            raise failures.pop()
        return real(entries)

    monkeypatch.setattr(audit_spool, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(AuditEntry.objects, "bulk_create", failing)
    spool.start()
    assert spool.keep(made(1))
    wait_for(lambda: written() == ["sbx_1"], 30)
    assert failures == []


def test_one_that_the_database_refuses_holds_up_no_other(
    spool: AuditSpool,
    made: Callable[[int], AuditEntry],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = AuditEntry.objects.bulk_create

    def refusing(entries: list[AuditEntry]) -> object:
        if any(each.object_id == "sbx_2" for each in entries):
            raise DataError("invalid")
        return real(entries)

    monkeypatch.setattr(AuditEntry.objects, "bulk_create", refusing)
    for number in range(1, 4):
        assert spool.keep(made(number))
    spool.start()
    wait_for(lambda: written() == ["sbx_1", "sbx_3"], 30)
    assert "refuses an audit entry" in caplog.text
    assert "sbx_2" in caplog.text


def test_what_a_killed_process_left_is_written_once(
    made: Callable[[int], AuditEntry], tmp_path: Path
) -> None:
    entries = [made(number) for number in range(5)]
    killed = AuditSpool(tmp_path)
    assert all(killed.keep(each) for each in entries)
    os.write(killed._current.descriptor, b'{"half of a li')
    # As the kernel does.
    os.close(killed._current.descriptor)
    # Killed after a part of it was written.
    AuditEntry.objects.bulk_create(entries[:2])
    living = AuditSpool(tmp_path)
    assert living.keep(made(9))
    following = AuditSpool(tmp_path)
    following.start()
    wait_for(lambda: len(written()) == 5, 30)
    following.close()
    assert written() == [f"sbx_{number}" for number in range(5)]
    # The other one's, which still runs, are its own to write.
    assert len(kept(tmp_path)) == 1
    living.start()
    living.close()
    assert len(written()) == 6


@pytest.mark.parametrize(
    "line", [b"\0" * 4096, b'{"at": "2026-', b"[]", b"{}", b'{"at": "2026-12-01", "colour": 1}']
)
def test_a_line_that_cannot_be_read_holds_up_no_other(
    made: Callable[[int], AuditEntry],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    line: bytes,
) -> None:
    left = [encode(made(1)), line + b"\n", encode(made(2))]
    (tmp_path / f"1-1{audit_spool.SUFFIX}").write_bytes(b"".join(left))
    following = AuditSpool(tmp_path)
    following.start()
    assert following.keep(made(3))
    following.close()
    assert written() == ["sbx_1", "sbx_2", "sbx_3"]
    assert list(tmp_path.iterdir()) == []
    assert "can't be read" in caplog.text


@pytest.mark.parametrize("problem", ["no space", "half of it", "too many"])
def test_what_cannot_be_kept_is_for_the_caller_to_write(
    spool: AuditSpool,
    made: Callable[[int], AuditEntry],
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
) -> None:
    real = os.write

    def no_space(descriptor: int, data: bytes) -> int:
        if problem == "no space":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:20])

    assert spool.keep(made(1))
    if problem == "too many":
        monkeypatch.setattr(audit_spool, "MAX_PENDING", 1)
    else:
        monkeypatch.setattr(os, "write", no_space)
    assert not spool.keep(made(2))
    monkeypatch.undo()
    assert spool.keep(made(3))
    content = spool._current.path.read_bytes()
    assert [b"sbx_1" in line or b"sbx_3" in line for line in content.splitlines()] == [True, True]


def test_a_file_that_cannot_be_read_holds_up_no_other(
    spool: AuditSpool, made: Callable[[int], AuditEntry], tmp_path: Path
) -> None:
    (tmp_path / "0-0.spool").mkdir()
    spool.start()
    assert spool.keep(made(1))
    wait_for(lambda: written() == ["sbx_1"], 30)
