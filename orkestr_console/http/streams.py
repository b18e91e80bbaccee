"""Responses that are sent as their content comes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Protocol

from django.http import StreamingHttpResponse


class Closable(Protocol):
    """What a stream can be made from."""

    async def aclose(self) -> None:
        """End it; idempotent."""


class OwningStream(StreamingHttpResponse):
    """A stream that ends what it is made from, even if its client leaves before it has begun.

    An asynchronous generator that was never started runs none of its own ``finally``; left to the
    garbage collector, what it reads from would go on for seconds.
    """

    def __init__(self, content: AsyncIterator[bytes], *sources: Closable, **options: Any) -> None:
        super().__init__(content, **options)
        self._content, self._sources = content, sources

    async def aclose(self) -> None:
        """End the content, then its sources; those that have ended stay as they are."""
        if isinstance(self._content, AsyncGenerator):
            await self._content.aclose()
        for source in self._sources:
            await source.aclose()
