"""The asynchronous toolbox: what is finished, what takes turns, and what goes on."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import pytest

from hostruntime.errors import HostFault
from hostruntime.host.tasks import (
    KeyedLocks,
    cancel_and_wait,
    every,
    in_background,
    in_thread,
    log_errors,
    readable,
    run_to_completion,
    shielded,
    writable,
)


async def soon(true: threading.Event | asyncio.Event) -> None:
    async with asyncio.timeout(20):
        while not true.is_set():
            await asyncio.sleep(0.001)


# Work that is not torn --------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_cancelled_caller_waits_for_the_end(cancels: int) -> None:
    go_on, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        done.set()

    caller = asyncio.create_task(run_to_completion(work()))
    for _ in range(cancels):
        await asyncio.sleep(0.01)
        caller.cancel()
    await asyncio.sleep(0.01)
    assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert done.is_set()


async def test_a_thread_is_waited_for_too() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(20)

    caller = asyncio.create_task(in_thread(work, on_cancel=go_on.set))
    await soon(begun)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert go_on.is_set()


async def test_unbroken_work_goes_on_without_its_caller(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    go_on = asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        raise HostFault("it went wrong")

    caller = asyncio.create_task(shielded(work()))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    go_on.set()
    await asyncio.sleep(0.01)
    assert "it went wrong" in caplog.text
    with pytest.raises(HostFault):
        await shielded(work())


# Turns ------------------------------------------------------------------------------------


async def test_one_name_one_turn_and_nothing_is_left() -> None:
    locks, inside, most = KeyedLocks(), 0, 0

    async def enter() -> None:
        nonlocal inside, most
        async with locks.holding("a"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    async with locks.holding("b"):
        waiting = [asyncio.create_task(enter()) for _ in range(10)]
        await asyncio.sleep(0.002)
        waiting[5].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert (most, len(locks)) == (1, 1)
    assert len(locks) == 0


async def test_who_comes_while_one_leaves_waits_for_those_who_waited_before() -> None:
    """A lock that is thrown away by its holder would let the third in beside the second."""
    locks, order = KeyedLocks(), []

    async def enter(name: str) -> None:
        async with locks.holding("a"):
            order.append(f"{name} in")
            await asyncio.sleep(0.01)
            order.append(f"{name} out")

    first, second = asyncio.create_task(enter("1")), asyncio.create_task(enter("2"))
    await first
    await asyncio.gather(second, enter("3"))
    assert order == ["1 in", "1 out", "2 in", "2 out", "3 in", "3 out"]


# Descriptors ------------------------------------------------------------------------------


async def test_readiness_is_waited_for() -> None:
    reading, writing = os.pipe()
    try:
        await writable(writing)
        waiting = asyncio.create_task(readable(reading))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        os.write(writing, b"x")
        await asyncio.wait_for(waiting, 20)
        os.read(reading, 1)
        waiting = asyncio.create_task(readable(reading))
        await asyncio.sleep(0)
        await cancel_and_wait(waiting)
        assert not asyncio.get_running_loop().remove_reader(reading)
    finally:
        os.close(reading)
        os.close(writing)


# What goes on by itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised", [ZeroDivisionError("x"), HostFault("x"), OSError(5, "x"), asyncio.CancelledError()]
)
async def test_a_loop_goes_on_whatever_its_work_raises(raised: BaseException) -> None:
    rounds, third = 0, asyncio.Event()

    async def work() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            third.set()
        raise raised

    task = every(0.001, work, "it failed")
    await soon(third)
    await cancel_and_wait(task)
    assert task.cancelled()


async def test_a_defect_is_told_with_its_place_and_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    enough = asyncio.Event()
    failures: list[Exception] = [ZeroDivisionError("a defect")] * 5 + [HostFault("the host's")] * 5

    async def work() -> None:
        if not failures:
            enough.set()
            return
        raise failures.pop(0)

    task = every(lambda: 0.001, work, "it failed", immediately=True)
    await soon(enough)
    await cancel_and_wait(task)
    told = [(record.getMessage(), bool(record.exc_info)) for record in caplog.records]
    assert told == [("it failed: a defect", True), ("it failed: the host's", False)]


async def test_a_loop_ends_in_the_middle_of_its_work() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.sleep(60)

    task = every(0, work, "it failed")
    await soon(begun)
    began = time.monotonic()
    await cancel_and_wait(task, None)
    assert time.monotonic() - began < 20


async def test_what_nobody_waits_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        raise ZeroDivisionError("a defect")

    await in_background(work(), "it failed")
    with log_errors("so did this"):
        raise KeyError("gone")
    assert [record.getMessage() for record in caplog.records] == [
        "it failed: a defect",
        "so did this: 'gone'",
    ]
