"""The client for files on their way into and out of sandboxes, as streams of any length."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from hostruntime.client.ports import receive_socket
from hostruntime.errors import HostError, HostFault, HostUnavailable
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import readable, receive_into, send_all
from hostruntime.wire.files import FilePart
from hostruntime.wire.message import MalformedError, decode, encode
from hostruntime.wire.ports import ports_socket
from hostruntime.wire.transfers import (
    MAX_TRANSFER_MESSAGE_BYTES,
    OpenTransfer,
    TransferAnswer,
)

# More than the agent gives the process in the container for one step (hostruntime.container.files),
# so that it is the agent who says what was wrong.
SILENCE_SECONDS = 90.0
# No more than the event loop can pass on without making others wait.
PIECE_BYTES = 256 * 1024


@dataclass(frozen=True)
class Transfer:
    """A transfer that has begun: the connection to the agent, and the file's bytes."""

    link: socket.socket
    stream: socket.socket
    # Of a file that is read.
    part: FilePart | None

    async def pieces(self) -> AsyncIterator[memoryview]:
        """The bytes as they come; each piece is valid until the next is asked for.

        They end early if the file is cut, or what reads it is killed.  Raises TimeoutError.
        """
        assert self.part is not None
        left = self.part.length
        buffer = memoryview(bytearray(min(left, PIECE_BYTES)))
        while left:
            into = buffer[: min(left, PIECE_BYTES)]
            try:
                count = await receive_into(self.stream, into, scaled(SILENCE_SECONDS))
            except ConnectionError:
                return
            if not count:
                return
            left -= count
            yield buffer[:count]

    async def write(self, content: AsyncIterator[bytes | memoryview]) -> int:
        """Send all of the content; the bytes written, once the file is in its place.

        Raises what ``content`` does, HostError, TimeoutError.
        """
        sending = asyncio.ensure_future(self._send(content))
        answered = asyncio.ensure_future(readable(self.link.fileno()))
        try:
            # An answer before the end of the content is a refusal, or the agent has hung up.
            await asyncio.wait({sending, answered}, return_when=asyncio.FIRST_COMPLETED)
            if not answered.done():
                sending.result()
                async with asyncio.timeout(scaled(SILENCE_SECONDS)):
                    await asyncio.shield(answered)
            return self._written()
        finally:
            for task in (sending, answered):
                task.cancel()
            await asyncio.gather(sending, answered, return_exceptions=True)

    async def _send(self, content: AsyncIterator[bytes | memoryview]) -> None:
        try:
            async for piece in content:
                await send_all(self.stream, piece, scaled(SILENCE_SECONDS))
            # Content that is too short is no file.
            self.stream.shutdown(socket.SHUT_WR)
        except ConnectionError:
            # What writes the file is gone: the agent says why.
            return

    def _written(self) -> int:
        answer = _parse(self.link.recv(MAX_TRANSFER_MESSAGE_BYTES))
        if answer.written is None:
            raise HostFault("The host agent did not say how much it wrote.")
        return answer.written


@asynccontextmanager
async def begun(host_socket: Path, request: OpenTransfer) -> AsyncIterator[Transfer]:
    """Begin a transfer, which ends with the block.

    Raises what the agent refuses it with, HostUnavailable, TimeoutError.
    """
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        link.connect(str(ports_socket(host_socket)))
        link.send(encode(request))
        async with asyncio.timeout(scaled(SILENCE_SECONDS)):
            await readable(link.fileno())
        data, stream = receive_socket(link, MAX_TRANSFER_MESSAGE_BYTES)
        if stream is not None:
            stack.enter_context(stream)
        answer = _parse(data)
        if stream is None:
            raise HostFault("The host agent did not open what it should.")
        yield Transfer(link, stream, answer.part)


def _parse(data: bytes) -> TransferAnswer:
    """Raises HostError."""
    if not data:
        raise HostUnavailable("The host agent has just stopped; try again.")
    try:
        answer = decode(TransferAnswer, data)
    except MalformedError as error:
        raise HostFault(f"The host agent's answer makes no sense: {error}") from error
    if answer.error:
        raise HostError.from_wire(answer.error)
    return answer
