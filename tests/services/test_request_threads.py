"""The threads of requests: shared, bounded, and gone once they are not needed."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest

from hostruntime.host.patience import scaled
from orkestr_console.accounts.turns import Turns
from orkestr_console.core.hosts import Steps
from orkestr_console.http.steps import run_in_threads
from orkestr_console.http.threads import (
    RequestThreads,
    ServerThreads,
    in_thread,
    server_threads,
)
from tests.stack import wait_for


def test_calls_one_after_the_other_share_a_thread() -> None:
    threads = RequestThreads(10)
    used = {threads.submit(threading.get_ident).result(20) for _ in range(200)}
    assert len(used) == 1


def test_a_burst_has_threads_of_its_own_which_end_afterwards() -> None:
    threads = RequestThreads(20, idle_seconds=0.2)
    together = threading.Barrier(20)

    def meet() -> threading.Thread:
        together.wait(20)
        return threading.current_thread()

    burst = [threads.submit(meet) for _ in range(20)]
    used = {each.result(20) for each in burst}
    assert len(used) == 20
    wait_for(lambda: not any(thread.is_alive() for thread in used), scaled(20))
    # And there are others when they are needed.
    assert threads.submit(lambda: "answered").result(20) == "answered"


def test_a_thread_that_ends_loses_no_call() -> None:
    threads = RequestThreads(4, idle_seconds=0.001)
    calls = []
    for number in range(300):
        calls.append(threads.submit(int, number))
        time.sleep(0.001)
    assert [call.result(20) for call in calls] == list(range(300))


def test_past_the_most_calls_wait() -> None:
    threads, begun, seen = RequestThreads(2), threading.Event(), list[int]()
    for _ in range(2):
        threads.submit(begun.wait, 20)
    calls = [threads.submit(seen.append, number) for number in range(5)]
    abandoned = threads.submit(seen.append, 99)
    assert abandoned.cancel()
    assert seen == []
    begun.set()
    for call in calls:
        call.result(20)
    assert sorted(seen) == list(range(5))


def test_an_error_is_the_callers_and_the_thread_goes_on() -> None:
    threads = RequestThreads(1)

    def fail() -> None:
        raise KeyboardInterrupt("a view's")

    with pytest.raises(KeyboardInterrupt, match="a view's"):
        threads.submit(fail).result(20)
    assert threads.submit(lambda: 1).result(20) == 1


def test_an_idle_thread_remembers_no_request() -> None:
    class Request:
        pass

    threads, request = RequestThreads(1), Request()
    ended = weakref.ref(request)
    gc.disable()
    try:
        assert threads.submit(isinstance, request, Request).result(20)
        del request
        wait_for(lambda: ended() is None, scaled(20))
    finally:
        gc.enable()


def test_whose_turn_it_is_goes_on_though_the_others_have_all_threads() -> None:
    """Those of short parts may wait for the same turn, and would wait for ever."""
    turns = Turns()

    def in_steps() -> Steps[str]:
        yield from turns.wait("Acme")
        with turns.taken("Acme"):
            return "in steps"

    def in_a_thread() -> str:
        with turns.turn("Acme"):
            return "in a thread"

    async def both() -> list[str]:
        threads = ServerThreads()
        threads.parts = RequestThreads(1)
        server_threads.set(threads)
        with turns.turn("Acme"):
            first = asyncio.create_task(run_in_threads(in_steps()))
            while not waiting(turns):
                await asyncio.sleep(0)
            second = asyncio.create_task(in_thread(in_a_thread))
            while waiting(turns) < 2:
                await asyncio.sleep(0)
        async with asyncio.timeout(scaled(10)):
            return [await first, await second]

    assert asyncio.run(both()) == ["in steps", "in a thread"]


def waiting(turns: Turns) -> int:
    return sum(len(queue) for queue in turns._waiting.values())
