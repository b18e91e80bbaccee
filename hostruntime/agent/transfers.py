"""Files on their way into and out of sandboxes (:mod:`hostruntime.wire.transfers`)."""

from __future__ import annotations

import asyncio
import socket

from hostruntime.container.files import Stream
from hostruntime.container.transfers import TransferService
from hostruntime.host.tasks import readable
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.message import encode
from hostruntime.wire.transfers import OpenTransfer, TransferAnswer


class TransferServer:
    """Begins transfers, and ends them with their clients, who have their bytes."""

    def __init__(self, sandboxes: SandboxManager) -> None:
        self._sandboxes = sandboxes
        self._transfers = TransferService(sandboxes.containers.files)

    async def serve(self, link: socket.socket, request: OpenTransfer) -> None:
        """Serve one transfer to the client at the other end of ``link``, until it hangs up.

        Raises HostError, which is its last answer, and OSError if it has left.
        """
        name = self._sandboxes.container_name(request.sandbox)
        if request.size is None:
            await self._download(link, name, request)
        else:
            await self._upload(link, name, request.path, request.size)

    async def _download(self, link: socket.socket, name: str, request: OpenTransfer) -> None:
        opening = self._transfers.download(name, request.path, request.wanted)
        async with opening as (part, stream):
            _hand_over(link, stream, TransferAnswer(part=part))
            await readable(link.fileno())

    async def _upload(self, link: socket.socket, name: str, path: str, size: int) -> None:
        async with self._transfers.upload(name, path, size) as stream:
            _hand_over(link, stream, TransferAnswer())
            answer = asyncio.ensure_future(stream.answer())
            left = asyncio.ensure_future(readable(link.fileno()))
            try:
                await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
                if answer.done():
                    answer.result()
                    link.send(encode(TransferAnswer(written=size)))
            finally:
                answer.cancel()
                left.cancel()
                await asyncio.gather(answer, left, return_exceptions=True)


def _hand_over(link: socket.socket, stream: Stream, answer: TransferAnswer) -> None:
    socket.send_fds(link, [encode(answer)], [stream.sock.fileno()])
