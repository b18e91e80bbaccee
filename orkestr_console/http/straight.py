"""Large bodies by way of the socket, past the server's buffers.

Twisted makes an object of what it has received, and joins what it sends, so that each byte is
copied several times, and each piece takes several turns of the event loop. What is large is
received into and sent from one buffer instead, while Twisted has nothing to read or nothing to
write. The connection, its errors and its end remain its own.

The socket is used by a copy of its descriptor: Twisted may close its own at any time, and the
number is soon another connection's.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from django.http import HttpRequest

from hostruntime.host.tasks import send_all

logger = logging.getLogger(__name__)

# A client that reads nothing for so long is disconnected.
STALL_TIMEOUT = 60.0
# Where the ASGI scope has the request of our server, which has a transport and can be cut off.
REQUEST_KEY = "orkestr.request"


@contextmanager
def copied_socket(transport: Any) -> Iterator[socket.socket]:
    """The non-blocking socket of a connection, by a descriptor of its own."""
    with socket.socket(fileno=os.dup(transport.fileno())) as sock:
        # The same for both.
        sock.setblocking(False)  # noqa: FBT003 - positional-only
        yield sock


class Outlet:
    """Sends the content of a response whose head, and first piece, Twisted has sent."""

    def __init__(self, request: Any, sock: socket.socket) -> None:
        self._request = request
        self._sock = sock

    async def send(self, piece: memoryview) -> bool:
        """Send a piece; False if the client reads no more."""
        try:
            await send_all(self._sock, piece, STALL_TIMEOUT)
        except TimeoutError:
            logger.warning("disconnected a client that read nothing for %.0f s", STALL_TIMEOUT)
            self._request.cut_off()
            return False
        except OSError:
            return False
        return True


@contextmanager
def outlet(request: HttpRequest) -> Iterator[Outlet | None]:
    """For a response that has not begun; None if it has to be sent as any other.

    The first piece must be sent as usual, and has left when the second is asked for.
    """
    server_request = getattr(request, "scope", {}).get(REQUEST_KEY)
    if server_request is None or server_request.channel is None:
        yield None
        return
    transport = server_request.channel.transport
    with ExitStack() as stack:
        try:
            sock = stack.enter_context(copied_socket(transport))
        except OSError as error:
            # No descriptor is left; Twisted has its own.
            logger.warning("a response is not sent past Twisted: %s", error)
            client = None
        else:
            client = Outlet(server_request, sock)
            stack.callback(setattr, transport, "unsent_bytes", transport.unsent_bytes)
            # With any unsent, Twisted has the sender wait until there is nothing.
            transport.unsent_bytes = 0
        yield client
