"""One request to a program in a sandbox and its response, or a WebSocket between the two.

Each exchange has a connection to the program of its own, which ends with it: no bytes of one
request can be taken for another's, and a visitor's open tab holds nothing inside. Request and
response pass at the same time, as a program may answer before it has read everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import h11

from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.previews.headers import outwards, websocket_answer
from orkestr_console.previews.wire import HeadTooLarge, Wire

# How long nothing may pass at all: while the visitor sends a body, afterwards, over a WebSocket.
BODY_SECONDS, RESPONSE_SECONDS, WEBSOCKET_SECONDS = 60.0, 600.0, 3600.0
# How long the other direction of a WebSocket may go on once one has ended.
CLOSING_SECONDS = 5.0
SWITCHING = 101


class VisitorLeft(Exception):  # noqa: N818 - what happened
    """The visitor's connection has ended, or can't be used any more."""


class ProgramFailed(Exception):  # noqa: N818 - what happened
    """The program ended its connection, or sent what is no HTTP."""


class Switched(Exception):  # noqa: N818 - what happened
    """HTTP is over: the rest of both connections is a WebSocket's."""


class NothingPasses(Exception):  # noqa: N818 - what happened
    """Neither side has sent or taken anything for too long."""


@dataclass
class Idle:
    """Ends what has been idle for too long."""

    seconds: float = BODY_SECONDS
    _since: float = field(default_factory=monotonic)

    def touch(self) -> None:
        """Something has passed."""
        self._since = monotonic()

    def allow(self, seconds: float) -> None:
        """From now on, so long."""
        self.seconds = seconds
        self.touch()

    async def watch(self) -> None:
        """Raise ``NothingPasses`` once nothing has passed for so long."""
        while (left := self._since + self.seconds - monotonic()) > 0:
            # It may be allowed less time meanwhile.
            await asyncio.sleep(min(left, BODY_SECONDS))
        raise NothingPasses


@dataclass
class Exchange:
    """A request whose head was read, and a connection to the program that it is for."""

    visitor: Wire
    program: Wire
    request: h11.Request
    base: PreviewBase
    # Whether a part of the response is on its way to the visitor.
    answered: bool = False
    _idle: Idle = field(default_factory=Idle)

    async def run(self) -> None:
        """Carry both.

        Raises ``VisitorLeft``, ``ProgramFailed``, ``NothingPasses``, ``Switched``.
        """
        try:
            await self.program.send(self.request)
        except OSError as error:
            raise ProgramFailed from error
        await first_to_end(self._send_body(), self._respond(), self._idle.watch())

    async def _send_body(self) -> None:
        """Pass on the request's body, then watch for the visitor to leave; never returns.

        Raises ``VisitorLeft``.
        """
        if self.visitor.http.they_are_waiting_for_100_continue:
            await self._to_visitor(h11.InformationalResponse(status_code=100, headers=[]))
        while not isinstance(event := await self._from_visitor(), h11.EndOfMessage):
            assert isinstance(event, h11.Data)
            if not await self._to_program(h11.Data(data=event.data)):
                # It has ended, and may have said why before.
                await asyncio.Event().wait()
        await self._to_program(h11.EndOfMessage())
        self._idle.allow(RESPONSE_SECONDS)
        await self.visitor.left()
        raise VisitorLeft

    async def _from_visitor(self) -> object:
        try:
            event = await self.visitor.receive()
        except (h11.RemoteProtocolError, OSError) as error:
            raise VisitorLeft from error
        self._idle.touch()
        return event

    async def _to_program(self, event: h11.Data | h11.EndOfMessage) -> bool:
        """False if it reads no more."""
        try:
            await self.program.send(event)
        except OSError:
            return False
        self._idle.touch()
        return True

    async def _respond(self) -> None:
        event = await self._from_program()
        while isinstance(event, h11.InformationalResponse):
            if event.status_code == SWITCHING:
                await self._switch(event)
                return
            # Hints that the visitor can do without (RFC 8297).
            event = await self._from_program()
        if not isinstance(event, h11.Response):
            raise ProgramFailed
        headers = outwards(list(event.headers), self.base)
        await self._to_visitor(
            h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
        )
        while isinstance(event := await self._from_program(), h11.Data):
            await self._to_visitor(h11.Data(data=event.data))
        await self._to_visitor(h11.EndOfMessage())

    async def _from_program(self) -> object:
        try:
            event = await self.program.receive()
        except (h11.RemoteProtocolError, OSError, HeadTooLarge) as error:
            raise ProgramFailed from error
        self._idle.touch()
        return event

    async def _to_visitor(
        self, event: h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage
    ) -> None:
        if not isinstance(event, h11.InformationalResponse):
            self.answered = True
        try:
            await self.visitor.send(event)
        except h11.LocalProtocolError as error:
            # Such as a header that only h11's more patient side takes.
            raise ProgramFailed from error
        except OSError as error:
            raise VisitorLeft from error
        self._idle.touch()

    async def _switch(self, event: h11.InformationalResponse) -> None:
        """Accept a WebSocket. Raises ``Switched``."""
        headers = websocket_answer(list(event.headers), self.base)
        self.answered = True
        await self._to_visitor(
            h11.InformationalResponse(status_code=SWITCHING, headers=headers, reason=event.reason)
        )
        raise Switched


@dataclass
class Tunnel:
    """A WebSocket, whose frames nobody here looks at."""

    visitor: Wire
    program: Wire
    _idle: Idle = field(default_factory=lambda: Idle(WEBSOCKET_SECONDS))

    async def run(self) -> None:
        """Pass on bytes in both directions until one side has ended. Raises ``NothingPasses``."""
        first = asyncio.create_task(self._pass(self.visitor, self.program))
        second = asyncio.create_task(self._pass(self.program, self.visitor))
        await first_to_end(self._both(first, second), self._idle.watch())

    async def _both(self, *directions: asyncio.Task[None]) -> None:
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(directions, timeout=CLOSING_SECONDS)
        finally:
            for each in directions:
                each.cancel()
            await asyncio.gather(*directions, return_exceptions=True)

    async def _pass(self, source: Wire, target: Wire) -> None:
        # What has arrived together with the last of HTTP.
        data, _ = source.http.trailing_data
        with contextlib.suppress(OSError):
            while data or (data := await source.receive_raw()):
                await target.send_raw(data)
                self._idle.touch()
                data = b""
        with contextlib.suppress(OSError):
            target.sock.shutdown(socket.SHUT_WR)


async def first_to_end(*works: Coroutine[Any, Any, None]) -> None:
    """Run all at once until the first ends; raises what it raises. None of them goes on."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
