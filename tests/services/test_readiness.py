"""What `/readyz` says, and that it never waits for what it tells of."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from django.db import connection
from django.test import Client
from psycopg_pool import ConnectionPool

from hostruntime.host.disk_space import DiskSpace
from orkestr_console.http import readiness as looking
from orkestr_console.http.readiness import Findings, Probe, Readiness, is_ready
from tests.stack import wait_for


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What a look can wait for; it is let go at the end."""
    event = threading.Event()
    yield event
    event.set()


def watching(*looks: Probe) -> Readiness:
    found = Readiness(looks)
    found.start()
    return found


def test_a_thing_that_hangs_is_silent_and_its_last_good_answer_grows_old(
    hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "PROBE_TIMEOUT", 0.3)
    monkeypatch.setattr(looking, "PROBE_SECONDS", 0.01)
    looks = iter([True, False])

    def once_and_never_again() -> Findings:
        if not next(looks, True):
            hanging.wait()
        return {"thing": None}

    ready = watching(
        Probe(("thing",), once_and_never_again), Probe(("other",), lambda: {"other": None})
    )
    wait_for(lambda: ready.checks()["thing"].state == "silent", 20)
    first = ready.checks()
    assert first["thing"].age_seconds is not None
    assert first["thing"].age_seconds > 0.3
    # One that hangs keeps nobody from looking at the others.
    assert first["other"].state == "ok"
    assert not is_ready(first)
    hanging.set()
    wait_for(lambda: ready.checks()["thing"].state != "silent", 20)


def test_nothing_is_well_before_it_was_looked_at() -> None:
    check = Probe(("thing",), lambda: {"thing": None}).checks()["thing"]
    assert (check.state, check.age_seconds) == ("unknown", None)


def test_a_look_that_fails_tells_nothing_of_why_to_strangers() -> None:
    def broken() -> Findings:
        raise ValueError("secret")

    look = Probe(("thing",), broken)
    look.run_once()
    assert "secret" not in str(look.checks()["thing"].to_wire())
    assert look.checks()["thing"].state == "failing"


@pytest.mark.django_db(transaction=True)
def test_an_exhausted_pool_is_noticed() -> None:
    pool: ConnectionPool = connection.pool  # type: ignore[attr-defined]
    before = looking.probe_database()
    assert before["database"] is None
    held = [pool.getconn() for _ in range(pool.max_size)]
    patient, pool.timeout = pool.timeout, 0.2
    try:
        assert looking.probe_database()["database"] == (
            "cannot be reached, or has no connection free"
        )
    finally:
        pool.timeout = patient
        for one in held:
            pool.putconn(one)
    assert looking.probe_database()["database"] is None


@pytest.mark.parametrize(
    ("seconds", "wrong"), [(None, "does not run"), (0.5, None), (3600.0, "does not take tasks")]
)
def test_a_worker_is_well_while_it_comes_round(seconds: float | None, wrong: str | None) -> None:
    assert looking.worker_problem(seconds) == wrong


def test_a_disk_without_room_is_no_place_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert looking.disk_problem(tmp_path / "not" / "there" / "yet") is None
    found = DiskSpace.of(tmp_path)
    half = replace(found, free_bytes=found.reserve_bytes // 2)
    monkeypatch.setattr(DiskSpace, "of", lambda _: half)
    assert "is short of room" in str(looking.disk_problem(tmp_path))
    monkeypatch.setattr(DiskSpace, "of", lambda _: replace(half, read_only=True))
    assert looking.disk_problem(tmp_path) == "cannot be written to"


def test_alive_asks_nobody(client: Client) -> None:
    """Not even the database: this test has none, and a query would fail it."""
    answer = client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_ready_waits_for_nothing(
    client: Client, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never() -> Findings:
        hanging.wait()
        return {}

    found = Readiness((Probe(("database",), never),))
    monkeypatch.setattr("orkestr_console.http.health.readiness", found)
    began = time.monotonic()
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert answer.json()["status"] == "not_ready"
    assert set(answer.json()["checks"]["database"]) == {"state", "age_seconds", "detail"}
    assert not hanging.is_set()
    assert time.monotonic() - began < looking.PROBE_TIMEOUT
