"""Files on their way into and out of sandboxes, over the agent's second socket.

One request a connection, in datagrams (SOCK_SEQPACKET, unix(7)), as for ports.  The first answer
carries one end of a stream (SCM_RIGHTS), whose other end the process inside the sandbox has, so
that none of the file's bytes pass through the agent.  A file that is sent in has a second answer,
once all of it is in its place.  Whoever hangs up ends the transfer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from hostruntime.wire.files import FilePart, WantedPart
from hostruntime.wire.message import Message

# A path has up to 4096 bytes, each of which JSON may take six for.
MAX_TRANSFER_MESSAGE_BYTES = 32 * 1024


@dataclass(frozen=True)
class OpenTransfer(Message):
    """A part of a file to be read, or with a ``size``, a file of so many bytes to be written."""

    sandbox: str
    path: str
    size: Annotated[int, Field(ge=0)] | None = None
    wanted: WantedPart = field(default_factory=WantedPart)


@dataclass(frozen=True)
class TransferAnswer(Message):
    """With a stream and, for a file that is read, which ``part`` of it comes; then how it ended.

    That is the number of bytes ``written``, or an ``error`` (:meth:`HostError.to_wire`).
    """

    error: Mapping[str, Any] = field(default_factory=dict)
    part: FilePart | None = None
    written: int | None = None
