"""What the end of a command that failed tells of the network policy."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator

import pytest

from hostruntime.container.exec import Chunk, Exited, Frame, Started, TimedOut
from hostruntime.network.firewall import Attempt, _attempt
from hostruntime.network.set_elements import Element
from hostruntime.sandbox.refusals import MAX_REFUSED, Refusals, with_refusals
from hostruntime.wire.commands import RefusedRequest
from hostruntime.wire.health import EgressDecision

FAILED: list[Exited | TimedOut] = [Exited(7, None, 5), Exited(139, 11, 5), TimedOut(5)]


def decision(host: str) -> EgressDecision:
    return EgressDecision(time.time(), "sbx_1", host, 443, "refused", "not_listed")


class Record:
    """An egress record: who asked for it, since when, and in which thread."""

    def __init__(self, *hosts: str) -> None:
        self.hosts = hosts
        self.asked: list[tuple[str, float, bool]] = []

    def __call__(self, owner: str, since: float) -> list[EgressDecision]:
        in_main = threading.current_thread() is threading.main_thread()
        self.asked.append((owner, since, in_main))
        return [decision(host) for host in self.hosts]


async def last_frame(end: Frame, record: Refusals) -> Frame:
    async def frames() -> AsyncGenerator[Frame, None]:
        yield Started(1)
        yield Chunk("stdout", b"x")
        yield end

    return [frame async for frame in with_refusals(frames(), "sbx_1", record)][-1]


@pytest.mark.parametrize("end", FAILED)
async def test_one_that_failed_tells_what_was_refused_since_it_began(
    end: Exited | TimedOut,
) -> None:
    record, before = Record("a.test", "a.test", "b.test"), time.time() - 0.001
    last = await last_frame(end, record)
    assert isinstance(last, Exited | TimedOut)
    assert last.refused == tuple(
        RefusedRequest(host, 443, "not_listed") for host in ("a.test", "b.test")
    )
    [(owner, since, in_main)] = record.asked
    assert (owner, in_main) == ("sbx_1", False)
    assert before <= since <= time.time()


async def test_one_that_succeeded_costs_no_look() -> None:
    record = Record("a.test")
    assert await last_frame(Exited(0, None, 5), record) == Exited(0, None, 5)
    assert record.asked == []


async def test_a_scan_is_told_in_part_and_an_unreadable_record_not_at_all() -> None:
    last = await last_frame(FAILED[0], Record(*(f"h{number}.test" for number in range(100))))
    assert isinstance(last, Exited)
    assert len(last.refused) == MAX_REFUSED

    def unreadable(owner: str, since: float) -> list[EgressDecision]:
        raise OSError(5, "Input/output error")

    assert await last_frame(FAILED[0], unreadable) == FAILED[0]


def test_an_attempt_tells_how_long_ago_it_was_and_seems_no_older() -> None:
    key = bytes([10, 0, 0, 1, 6, 0, 0, 0, 192, 0, 2, 1, 1, 187, 0, 0])
    assert _attempt(Element(key, 298_000)) == Attempt("10.0.0.1", "tcp", "192.0.2.1", 443, 1.99)
    assert _attempt(Element(key, 300_000)).age_seconds == 0.0
    # With network off they don't expire, and are looked at as soon as one is there.
    assert _attempt(Element(key, None)).age_seconds == 0.0
