"""A host that notes what of the database is held by whoever asks it."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from functools import wraps
from typing import Any

from django.db import connection

from tests.fakes.host import FakeHost


def in_use() -> int:
    """How many of the pool's connections somebody has now."""
    pool = connection.pool  # type: ignore[attr-defined]
    stats = pool.get_stats()
    return int(stats.get("pool_size", 0) - stats.get("pool_available", 0))


class WatchedHost:
    """A :class:`FakeHost`. ``asked`` has what it was asked, ``held`` those with a connection held.

    That is looked at when a method is called, and again before each piece of what it streams.
    """

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.asked: list[str] = []
        self.held: list[str] = []

    def _look(self, name: str) -> None:
        self.asked.append(name)
        if in_use():
            self.held.append(name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._host, name)

        @wraps(method)
        def asking(*args: Any, **kwargs: Any) -> Any:
            # On the event loop, a method is asked for by its name.
            self._look(args[0] if name == "ask" else name)
            answer = method(*args, **kwargs)
            if inspect.isasyncgen(answer):
                return self._later_pieces(name, answer)
            return self._pieces(name, answer) if isinstance(answer, Iterator) else answer

        return asking

    def _pieces(self, name: str, answer: Iterator[Any]) -> Iterator[Any]:
        while True:
            self._look(f"{name}, the next piece")
            try:
                piece = next(answer)
            except StopIteration:
                return
            yield piece

    async def _later_pieces(self, name: str, answer: Any) -> AsyncIterator[Any]:
        try:
            while True:
                self._look(f"{name}, the next piece")
                try:
                    piece = await anext(answer)
                except StopAsyncIteration:
                    return
                yield piece
        finally:
            await answer.aclose()
