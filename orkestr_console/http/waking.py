"""Calling again what found something asleep (:class:`orkestr_console.core.errors.Asleep`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from orkestr_console.core.errors import Asleep

# It may be paused again as soon as it is awake.
MAX_ATTEMPTS = 3


async def call_again[R](asleep: Asleep, call: Callable[[], Awaitable[R]]) -> R:
    """Wake what ``call`` found asleep, and call again. Raises what either raises."""
    for _ in range(MAX_ATTEMPTS):
        await asleep.wake()
        try:
            return await call()
        except Asleep as error:
            asleep = error
    raise asleep
