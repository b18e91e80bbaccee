"""The agent's second socket: connections into sandboxes, which it hands over.

To ports (:mod:`hostruntime.wire.ports`), and to what reads and writes files
(:mod:`hostruntime.wire.transfers`).  What a client sends and receives through one passes by the
agent, which has no part in it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hostruntime.agent.transfers import TransferServer
from hostruntime.container.ports import PortService
from hostruntime.errors import Conflict, HostError, HostFault, InvalidRequest
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import in_background, readable
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.wire.message import MalformedError, decode, encode
from hostruntime.wire.ports import OpenedPort, OpenPort
from hostruntime.wire.transfers import MAX_TRANSFER_MESSAGE_BYTES, OpenTransfer

# Clients send their request at once.
_REQUEST_SECONDS = 10.0
_PAUSE_AFTER_FAILURE_SECONDS = 0.1
_log = logging.getLogger(__name__)


class PortServer:
    """Serves :class:`OpenPort` and :class:`OpenTransfer` requests on a listening socket."""

    def __init__(self, sandboxes: SandboxManager, listening: socket.socket) -> None:
        self._sandboxes = sandboxes
        self._ports = PortService(sandboxes.containers)
        self._transfers = TransferServer(sandboxes)
        self._listening = listening
        self._serving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve for the duration of the block."""
        self._listening.setblocking(False)  # noqa: FBT003 - positional-only
        accepting = asyncio.create_task(self._accept(), name="ports")
        try:
            yield
        finally:
            for task in (accepting, *self._serving):
                task.cancel()
            await asyncio.gather(accepting, *self._serving, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            try:
                await readable(self._listening.fileno())
                link, _ = self._listening.accept()
            except BlockingIOError:
                continue
            except OSError:
                # Most likely there are no descriptors left.
                _log.exception("a request for a port could not be accepted")
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)
                continue
            task = in_background(self._serve(link), "a port could not be opened")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _serve(self, link: socket.socket) -> None:
        with link, contextlib.suppress(BlockingIOError, ConnectionError, TimeoutError):
            link.setblocking(False)  # noqa: FBT003 - positional-only
            async with asyncio.timeout(scaled(_REQUEST_SECONDS)):
                await readable(link.fileno())
            data = link.recv(MAX_TRANSFER_MESSAGE_BYTES)
            if not data:
                return
            try:
                request = _parse(data)
                if isinstance(request, OpenTransfer):
                    await self._transfers.serve(link, request)
                else:
                    with await self._open(request) as opened:
                        socket.send_fds(link, [encode(OpenedPort())], [opened.fileno()])
            except HostError as error:
                link.send(encode(OpenedPort(error.to_wire())))

    async def _open(self, request: OpenPort) -> socket.socket:
        """Raises HostError."""
        try:
            self._sandboxes.container_name(request.sandbox)
            if self._sandboxes.get(request.sandbox).request.network == "off":
                raise Conflict("The sandbox has no network, so its ports are closed to others.")
            return await self._ports.connect(request.sandbox, request.port)
        except OSError as error:
            raise HostFault(f"The port could not be opened: {error}.") from error


def _parse(data: bytes) -> OpenPort | OpenTransfer:
    """Whichever it is.  Raises InvalidRequest."""
    try:
        return decode(OpenTransfer, data)
    except MalformedError as transfer_error:
        try:
            return decode(OpenPort, data)
        except MalformedError as error:
            # Only one of the two has a path.
            reason = transfer_error if b'"path":' in data else error
            raise InvalidRequest(str(reason)) from error
