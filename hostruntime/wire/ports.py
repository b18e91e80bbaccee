"""Connections to ports inside a sandbox, over a socket of their own beside the agent's.

One request and one response a connection, each a datagram (SOCK_SEQPACKET, unix(7)): the response
carries the connected socket (SCM_RIGHTS), so that none of its bytes pass through the agent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hostruntime.wire.message import Message

MAX_PORT_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class OpenPort(Message):
    """A connection to a TCP port of a sandbox's loopback."""

    sandbox: str
    port: Annotated[int, Field(ge=1, le=65535)]


@dataclass(frozen=True)
class OpenedPort(Message):
    """The response: with the socket, or with an ``error`` (:meth:`HostError.to_wire`)."""

    error: Mapping[str, Any] = field(default_factory=dict)


def ports_socket(host_socket: Path) -> Path:
    """The socket for these messages, beside the agent's own."""
    return host_socket.with_name(f"{host_socket.name}.ports")
