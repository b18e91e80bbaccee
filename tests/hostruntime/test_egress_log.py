"""The egress logs: read from their end, for one owner, and never by the agent's event loop."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hostruntime.build.plan import Host, refused_hosts
from hostruntime.build.report import RefusedHost
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.rundir import RunDir
from hostruntime.network import egress_log
from hostruntime.network.egress import EgressProxy
from hostruntime.network.egress_log import read_entries
from hostruntime.network.slots import SlotPool
from hostruntime.network.squid_config import NOT_TLS_LOG
from tests.hostruntime.build_world import World

MIB = 1024**2


def line(owner: str, at: float, host: str = "h.test") -> bytes:
    """As Squid writes what was said that is not TLS."""
    text = f'{{"at":{at:.3f},"owner":"{owner}","address":"10.0.0.2","host":"{host}","port":443}}\n'
    return text.encode()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of what is read."""
    sizes: list[int] = []
    real = os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    yield sizes


def test_an_owners_entries_oldest_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(
        line("a", 1, "one")
        + line("b", 2)
        + b"garbage with a in it\n"
        + b'["a"]\n'
        + line("ab", 3)
        + line("a", 4, "two")
        + line("a", 5, "three")
        + line("a", 6)[:-9]
    )
    assert [entry["host"] for entry in read_entries(log, "a", 0)] == ["one", "two", "three"]
    assert [entry["host"] for entry in read_entries(log, "a", 4)] == ["two", "three"]
    assert read_entries(tmp_path / "none", "a", 0) == []


def test_lines_across_pieces_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(line("a", at, f"h{at}") for at in range(1, 200)))
    expected = [f"h{at}" for at in range(1, 200)]
    for piece in (1, 50, 97, 1000, MIB):
        monkeypatch.setattr(egress_log, "_CHUNK_BYTES", piece)
        assert [entry["host"] for entry in read_entries(log, "a", 0)] == expected


def test_reading_ends_where_the_lines_are_too_old(tmp_path: Path, reads: list[int]) -> None:
    log = tmp_path / "log"
    now = time.time()
    log.write_bytes(line("b", now - 100) * (20 * MIB // 90) + line("a", now))
    assert len(read_entries(log, "a", now - 10)) == 1
    assert len(reads) == 1
    reads.clear()
    os.utime(log, (now - 60, now - 60))
    assert read_entries(log, "a", now - 10) == []
    assert reads == []


def test_reading_ends_after_so_much(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress_log, "MAX_BYTES", 2 * MIB)
    monkeypatch.setattr(egress_log, "MAX_ENTRIES", 10)
    log = tmp_path / "log"
    log.write_bytes(line("a", 1, "first") + line("b", 1) * (5 * MIB // 90))
    assert read_entries(log, "a", 0) == []
    assert sum(reads) == 2 * MIB
    log.write_bytes(b"".join(line("a", at) for at in range(1, 30)))
    assert [entry["at"] for entry in read_entries(log, "a", 0)] == list(range(20, 30))


@pytest.fixture
def proxy(tmp_path: Path) -> EgressProxy:
    """One whose logs are there, though it does not run."""
    run_dir = RunDir(tmp_path)
    (run_dir.egress / "log").mkdir(parents=True)
    run_dir.decisions.mkdir()
    pool = cast("SlotPool", SimpleNamespace(run_dir=run_dir, record_attempts=lambda _: None))
    return EgressProxy(StatePaths(tmp_path), Instance(0), pool)


class Pauses:
    """The longest that an event loop's own thread computed without looking at its timers.

    In CPU seconds of that thread, so that a busy machine counts for nothing.
    """

    def __init__(self) -> None:
        self.longest = 0.0

    async def watch(self) -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            self.longest, last = max(self.longest, now - last), now


async def test_a_failed_step_does_not_stop_the_agent_for_a_large_log(
    tmp_path: Path, proxy: EgressProxy
) -> None:
    world = World(tmp_path)
    host: Host = world.builds._host
    threads: list[threading.Thread] = []

    def refusals(owner: str, since: float) -> list[RefusedHost]:
        threads.append(threading.current_thread())
        return refused_hosts(proxy, owner, since)

    world.builds._host = Host(
        host.store,
        host.containers,
        host.runtime_tree,
        refusals,
        host.layers,
    )
    later = time.time() + 60
    asked: dict[str, Any] = {"owner": "img_1", "address": "", "method": "CONNECT", "port": 443}
    said = {"verdict": "refused", "reason": "not_listed", "message": ""}
    decision = {"at": later, "host": "refused.test", **asked, **said}
    (proxy.run_dir.decisions / "img_1.ndjson").write_text(json.dumps(decision) + "\n")
    log = proxy.run_dir.egress / "log" / NOT_TLS_LOG
    with log.open("wb") as file:
        for _ in range(200):
            file.write(line("another", later) * (MIB // 90))
        file.write(line("img_1", later, "spoke-no-tls.test"))
    pauses = Pauses()
    watching = asyncio.create_task(pauses.watch())
    try:
        events = await world.build("fail 1")
    finally:
        watching.cancel()
        log.unlink()
    assert events[-1]["code"] == "network_policy_blocked"
    assert events[-1]["refused"] == ["refused.test"]
    assert "spoke-no-tls.test:443" in events[-1]["message"]
    assert threads and threading.main_thread() not in threads
    assert pauses.longest < 0.1
