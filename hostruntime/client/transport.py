"""Parsing what the agent sends: responses, frames of commands, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from hostruntime.errors import ContainerGone, ExecTimeout, HostError, HostFault, HostUnavailable
from hostruntime.host.patience import scaled
from hostruntime.wire.commands import ExecFrame, ExecResult
from hostruntime.wire.files import (
    DirectoryEntries,
    DirectoryListing,
    FileContent,
    FileStat,
)
from hostruntime.wire.message import MalformedError, Message, decode


def timeouts(*, read: float) -> httpx.Timeout:
    """Timeouts for the agent, whose progress cannot be observed here; ``read`` is in seconds."""
    limits = {"connect": 5.0, "read": read, "write": 60.0, "pool": 30.0}
    return httpx.Timeout(**{name: scaled(seconds) for name, seconds in limits.items()})


def parse[M: Message](kind: type[M], data: bytes | str) -> M:
    """Parse a response of the agent.  Raises HostFault if it is invalid."""
    try:
        return decode(kind, data)
    except MalformedError as error:
        raise HostFault(f"The answer of the host agent is not valid: {error}") from error


class ExecCollector:
    """Collects the frames of one exec."""

    def __init__(self) -> None:
        self.streams: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
        self.pid: int | None = None
        self.last: ExecFrame | None = None

    def add(self, frame: ExecFrame) -> None:
        """Add the next frame."""
        if frame.kind == "started":
            self.pid = frame.pid
        elif frame.kind == "chunk" and frame.stream in self.streams:
            self.streams[frame.stream].append(frame.data)
        else:
            self.last = frame

    def result(self) -> ExecResult:
        """The result of the command.  Raises the error that it ended with."""
        out, err = (b"".join(self.streams[name]) for name in ("stdout", "stderr"))
        last = self.last
        if last is None:
            raise ContainerGone("The host ended the command's stream before the command ended.")
        if last.kind == "error":
            raise exec_error(last, out, err)
        return ExecResult(
            code=last.code if last.code is not None else -1,
            signal=last.signal,
            stdout=out,
            stderr=err,
            duration_ms=last.duration_ms or 0,
            out_of_memory=last.out_of_memory,
            truncated=last.truncated,
            pid=self.pid,
            refused=last.refused,
        )


def exec_error(frame: ExecFrame, out: bytes, err: bytes) -> HostError:
    """The error in a stream's last frame, with the output so far."""
    payload: dict[str, Any] = {"code": frame.error_code, "message": frame.message}
    payload |= {"duration_ms": frame.duration_ms}
    if frame.signal is not None:
        payload["signal"] = frame.signal
    error = HostError.from_wire(payload)
    if isinstance(error, ExecTimeout):
        error.extra |= {"stdout": out, "stderr": err, "refused": frame.refused}
    return error


def parse_content(
    path: str, headers: Mapping[str, str], content: bytes
) -> FileContent | DirectoryListing:
    """Parse a response with a file or a directory."""
    stat = parse_stat(path, headers)
    if not stat.is_dir:
        return FileContent(stat, content)
    return DirectoryListing(stat, parse(DirectoryEntries, content).entries)


def parse_stat(path: str, headers: Mapping[str, str]) -> FileStat:
    """Parse a file's stat from the response headers."""
    return FileStat(
        path=path,
        exists=True,
        is_dir=headers["x-file-type"] == "directory",
        size=int(headers["x-file-size"]),
        mode=int(headers["x-file-mode"], 8),
        modified_at=float(headers["x-file-modified-at"]),
    )


def parse_error(status: int, body: bytes) -> HostError:
    """Parse an error response."""
    try:
        payload = json.loads(body)
    except ValueError:
        payload = None
    if not isinstance(payload, dict):
        payload = {"detail": f"The host agent answered {status} without a reason."}
    return HostError.from_wire(payload, status)


@contextmanager
def transport_errors(socket: Path) -> Iterator[None]:
    """Convert httpx's transport failures to HostUnavailable."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise no_answer(socket) from error
    except httpx.TransportError as error:
        raise unreachable(socket, error) from error


def no_answer(socket: Path) -> HostUnavailable:
    """The error for an agent that is there and says nothing."""
    return HostUnavailable(
        f"The host agent at {socket} did not answer in time. If this lasts, look at its log."
    )


def unreachable(socket: Path, error: Exception) -> HostUnavailable:
    """The error for an agent that is not there, or hung up."""
    hint = str(error) if socket.exists() else "is it running? Start it with `make run`."
    return HostUnavailable(f"The host agent at {socket} does not answer: {hint}")
