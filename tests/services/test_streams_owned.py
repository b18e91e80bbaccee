"""Whatever a stream reads from ends with it, also if the client left before it began."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from orkestr_console.http.handler import Handler
from orkestr_console.http.streams import OwningStream


class Source:
    """A generator that notes its end."""

    def __init__(self) -> None:
        self.ended = False

    async def lines(self) -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"line\n"
        finally:
            self.ended = True


async def content(lines: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    async for line in lines:
        yield line


@pytest.mark.parametrize("sent_before", [0, 1, 2])
async def test_a_client_that_leaves_ends_the_source(sent_before: int) -> None:
    source = Source()
    lines = source.lines()
    # As a command's first frame, which is waited for before there is a response.
    await anext(lines)
    response = OwningStream(content(lines), lines)
    messages: list[Any] = []

    async def send(message: Any) -> None:
        if len(messages) == sent_before:
            raise asyncio.CancelledError
        messages.append(message)

    with pytest.raises(asyncio.CancelledError):
        await Handler()._deliver(response, send)
    assert source.ended
