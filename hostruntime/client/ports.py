"""The client for connections to ports inside sandboxes."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from hostruntime.errors import HostError, HostFault, HostUnavailable
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import readable
from hostruntime.wire.message import MalformedError, decode, encode
from hostruntime.wire.ports import MAX_PORT_MESSAGE_BYTES, OpenedPort, OpenPort, ports_socket

OPEN_SECONDS = 15.0


async def open_port(host_socket: Path, sandbox_id: str, port: int) -> socket.socket:
    """A non-blocking socket that is connected to a port inside a sandbox; the caller closes it.

    Raises ``PortClosed``, ``ContainerPaused``, ``ContainerGone``, ``NotFound``, ``Conflict`` (a
    sandbox without a network), ``HostUnavailable``.
    """
    kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, kind) as link:
        try:
            async with asyncio.timeout(scaled(OPEN_SECONDS)):
                link.connect(str(ports_socket(host_socket)))
                link.send(encode(OpenPort(sandbox_id, port)))
                await readable(link.fileno())
            return _receive(link)
        except (OSError, TimeoutError) as error:
            raise HostUnavailable("The host agent does not respond.") from error


def _receive(link: socket.socket) -> socket.socket:
    """The socket of the response. Raises HostError, OSError."""
    data, opened = receive_socket(link, MAX_PORT_MESSAGE_BYTES)
    try:
        if not data:
            raise HostUnavailable("The host agent has just stopped; try again.")
        error = decode(OpenedPort, data).error
        if error or opened is None:
            raise HostError.from_wire(error)
    except MalformedError as error:
        _close(opened)
        raise HostFault(f"The host agent's answer makes no sense: {error}") from error
    except HostError:
        _close(opened)
        raise
    return opened


def receive_socket(link: socket.socket, most: int) -> tuple[bytes, socket.socket | None]:
    """A datagram of at most so many bytes, and the non-blocking socket that came with it, if any.

    Raises OSError.
    """
    data, descriptors, _, _ = socket.recv_fds(link, most, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        return data, None
    opened = socket.socket(fileno=descriptors[0])
    opened.setblocking(False)  # noqa: FBT003 - positional-only
    return data, opened


def _close(opened: socket.socket | None) -> None:
    if opened is not None:
        opened.close()
