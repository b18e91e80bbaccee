"""The threads of requests: shared, bounded, and gone once they are not needed."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from hostruntime.host.patience import scaled
from orkestr_console.http.threads import RequestThreads
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
