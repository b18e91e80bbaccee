"""Services that ask the host between their steps, run without holding a thread meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from orkestr_console.core.hosts import Done, Steps, Wait, advance, async_host
from orkestr_console.http.threads import in_thread, turn_in_thread

# The event loop keeps only weak references to tasks (asyncio.create_task).
_running: set[asyncio.Task[Any]] = set()


async def run_in_threads[R](steps: Steps[R]) -> R:
    """Run each step in a thread, and wait for the host on the event loop.

    What has begun is done to its end, as in a thread: the host may have a container by then. If
    this is cancelled, nobody waits for it.
    """
    return await to_its_end(walk(steps))


async def walk[R](steps: Steps[R]) -> R:
    """Run the steps. Raises what they raise.

    After a ``Future``, which is a turn, they go on in a thread that nobody who waits for one has.
    """
    resume: Callable[[], Wait] = partial(next, steps)
    reached: Wait | Done[R] = await in_thread(advance, resume)
    while not isinstance(reached, Done):
        has_turn = isinstance(reached, Future)
        try:
            answer = await wait_for(reached)
        except Exception as error:  # noqa: BLE001 - it is the answer
            resume = partial(steps.throw, error)
        else:
            resume = partial(steps.send, answer)
        run = turn_in_thread if has_turn else in_thread
        reached = await run(advance, resume)
    return reached.value


async def wait_for(reached: Wait) -> Any:
    """What a step waits for. Raises the host's errors."""
    if isinstance(reached, Future):
        return await asyncio.wrap_future(reached)
    return await async_host().ask(reached.method, *reached.args, **reached.kwargs)


async def to_its_end[R](work: Coroutine[Any, Any, R]) -> R:
    """Wait for a coroutine that ends by itself even if this is cancelled."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)
