"""Calls of the agent that both of its clients make: what is sent, and what the answer means.

Each function describes the call of HostClient's method of its name, which says more of it.  Nothing
here waits, so that one client can do it in a thread and the other inside an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlencode

from hostruntime.client.transport import parse, parse_content
from hostruntime.wire.background import CommandInfo, CommandList, CommandOutput, StartCommand
from hostruntime.wire.files import (
    DirectoryListing,
    EditedFile,
    EditFile,
    FileContent,
    FileStat,
    MakeDirectory,
    MoveFile,
    WrittenFile,
)
from hostruntime.wire.images import BaseInfo, Bases
from hostruntime.wire.interpreter import ContextInfo, ContextList, CreateContext
from hostruntime.wire.message import Message, encode
from hostruntime.wire.sandboxes import (
    CollectedUsage,
    CreateSandbox,
    CreateSnapshot,
    DeletedSandbox,
    MetricsHistory,
    MetricsPoint,
    SandboxInfo,
    SandboxMetrics,
    SetDeadline,
    SnapshotInfo,
    Usage,
    UsageInfo,
)

DEFAULT_MAX_FILE_BYTES = 16 * 1024 * 1024
SILENCE_SECONDS = 60.0
# A whole disk is copied before the answer is sent.
COPY_SECONDS = 600.0
# A kernel that has to be started first.
KERNEL_SECONDS = 180.0


class Answer(Protocol):
    """What a client has received."""

    @property
    def content(self) -> bytes:
        """The body."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, by their names in lower case."""


@dataclass(frozen=True)
class Call[R]:
    """One call: the request, how to read its answer, and how many seconds that may take."""

    method: str
    path: str
    read: Callable[[Answer], R]
    content: bytes | Iterable[bytes] = b""
    query: Mapping[str, Any] = field(default_factory=dict)
    silence_seconds: float = SILENCE_SECONDS

    @property
    def target(self) -> str:
        """The path with the query."""
        return f"{self.path}?{urlencode(self.query)}" if self.query else self.path


def message[M: Message](kind: type[M]) -> Callable[[Answer], M]:
    """Reads an answer that is a message of a kind."""
    return lambda answer: parse(kind, answer.content)


def nothing(_: Answer) -> None:
    """Reads an answer that says no more than that it is done."""


def bases() -> Call[list[BaseInfo]]:
    """The call of ``bases``."""
    return Call("GET", "/bases", lambda answer: list(parse(Bases, answer.content).bases))


def request_base(name: str) -> Call[BaseInfo]:
    """The call of ``request_base``."""
    return Call("PUT", f"/bases/{name}", message(BaseInfo))


def create_sandbox(request: CreateSandbox) -> Call[SandboxInfo]:
    """The call of ``create_sandbox``."""
    # A volume may have to be checked first.
    quick = request.snapshot is None and request.volume is None
    seconds = SILENCE_SECONDS if quick else COPY_SECONDS
    read, content = message(SandboxInfo), encode(request)
    return Call("POST", "/sandboxes", read, content, silence_seconds=seconds)


def sandbox(sandbox_id: str) -> Call[SandboxInfo]:
    """The call of ``sandbox``."""
    return Call("GET", f"/sandboxes/{sandbox_id}", message(SandboxInfo))


def set_deadline(sandbox_id: str, deadline: float | None) -> Call[SandboxInfo]:
    """The call of ``set_deadline``."""
    content = encode(SetDeadline(deadline))
    return Call("PATCH", f"/sandboxes/{sandbox_id}", message(SandboxInfo), content)


def pause_sandbox(sandbox_id: str, deadline: float | None) -> Call[SandboxInfo]:
    """The call of ``pause_sandbox``."""
    content = encode(SetDeadline(deadline))
    return Call("POST", f"/sandboxes/{sandbox_id}/pause", message(SandboxInfo), content)


def resume_sandbox(sandbox_id: str, deadline: float | None) -> Call[SandboxInfo]:
    """The call of ``resume_sandbox``."""
    content = encode(SetDeadline(deadline))
    return Call("POST", f"/sandboxes/{sandbox_id}/resume", message(SandboxInfo), content)


def delete_sandbox(sandbox_id: str, collected: Sequence[str] = ()) -> Call[UsageInfo | None]:
    """The call of ``delete_sandbox``."""
    query = {"collected": ",".join(collected)} if collected else {}

    def read(answer: Answer) -> UsageInfo | None:
        return parse(DeletedSandbox, answer.content).usage

    return Call("DELETE", f"/sandboxes/{sandbox_id}", read, query=query)


def start_command(sandbox_id: str, request: StartCommand) -> Call[CommandInfo]:
    """The call of ``start_command``."""
    path, content = f"/sandboxes/{sandbox_id}/commands", encode(request)
    return Call("POST", path, message(CommandInfo), content)


def background_commands(sandbox_id: str) -> Call[list[CommandInfo]]:
    """The call of ``background_commands``."""

    def read(answer: Answer) -> list[CommandInfo]:
        return list(parse(CommandList, answer.content).commands)

    return Call("GET", f"/sandboxes/{sandbox_id}/commands", read)


def command(sandbox_id: str, command_id: str) -> Call[CommandInfo]:
    """The call of ``command``."""
    return Call("GET", f"/sandboxes/{sandbox_id}/commands/{command_id}", message(CommandInfo))


def kill_command(sandbox_id: str, command_id: str) -> Call[CommandInfo]:
    """The call of ``kill_command``."""
    return Call("DELETE", f"/sandboxes/{sandbox_id}/commands/{command_id}", message(CommandInfo))


def command_output(
    sandbox_id: str, command_id: str, offset: int = 0, *, max_bytes: int | None = None
) -> Call[CommandOutput]:
    """The call of ``command_output``."""
    query = {"offset": offset} | ({} if max_bytes is None else {"max_bytes": max_bytes})
    path = f"/sandboxes/{sandbox_id}/commands/{command_id}/output"
    return Call("GET", path, message(CommandOutput), query=query)


def create_context(sandbox_id: str, request: CreateContext) -> Call[ContextInfo]:
    """The call of ``create_context``."""
    path, content = f"/sandboxes/{sandbox_id}/contexts", encode(request)
    return Call("POST", path, message(ContextInfo), content, silence_seconds=KERNEL_SECONDS)


def contexts(sandbox_id: str) -> Call[list[ContextInfo]]:
    """The call of ``contexts``."""

    def read(answer: Answer) -> list[ContextInfo]:
        return list(parse(ContextList, answer.content).contexts)

    return Call("GET", f"/sandboxes/{sandbox_id}/contexts", read)


def restart_context(sandbox_id: str, context_id: str) -> Call[ContextInfo]:
    """The call of ``restart_context``."""
    path, read = f"/sandboxes/{sandbox_id}/contexts/{context_id}/restart", message(ContextInfo)
    return Call("POST", path, read, silence_seconds=KERNEL_SECONDS)


def remove_context(sandbox_id: str, context_id: str) -> Call[None]:
    """The call of ``remove_context``."""
    return Call("DELETE", f"/sandboxes/{sandbox_id}/contexts/{context_id}", nothing)


def usage(sandbox_id: str | None = None) -> Call[list[UsageInfo]]:
    """The call of ``usage``."""
    query = {} if sandbox_id is None else {"id": sandbox_id}
    return Call("GET", "/usage", lambda a: list(parse(Usage, a.content).sandboxes), query=query)


def metrics(sandbox_id: str) -> Call[SandboxMetrics]:
    """The call of ``metrics``."""
    return Call("GET", f"/sandboxes/{sandbox_id}/metrics", message(SandboxMetrics))


def metrics_history(sandbox_id: str, since: float = 0.0) -> Call[list[MetricsPoint]]:
    """The call of ``metrics_history``."""

    def read(answer: Answer) -> list[MetricsPoint]:
        return list(parse(MetricsHistory, answer.content).points)

    return Call("GET", f"/sandboxes/{sandbox_id}/history", read, query={"since": since})


def acknowledge_usage(ids: Sequence[str]) -> Call[None]:
    """The call of ``acknowledge_usage``."""
    return Call("POST", "/usage/collected", nothing, encode(CollectedUsage(ids)))


def create_snapshot(snapshot_id: str, sandbox_id: str) -> Call[SnapshotInfo]:
    """The call of ``create_snapshot``."""
    path, content = f"/sandboxes/{sandbox_id}/snapshots", encode(CreateSnapshot(snapshot_id))
    return Call("POST", path, message(SnapshotInfo), content, silence_seconds=COPY_SECONDS)


def delete_snapshot(snapshot_id: str) -> Call[None]:
    """The call of ``delete_snapshot``."""
    return Call("DELETE", f"/snapshots/{snapshot_id}", nothing)


def delete_volume(volume_id: str) -> Call[None]:
    """The call of ``delete_volume``."""
    return Call("DELETE", f"/volumes/{volume_id}", nothing)


def copy_volume(volume_id: str) -> Call[None]:
    """The call of ``copy_volume``."""
    return Call("POST", f"/volumes/{volume_id}/copy", nothing, silence_seconds=COPY_SECONDS)


def read_path(
    sandbox_id: str, path: str, *, max_bytes: int = DEFAULT_MAX_FILE_BYTES
) -> Call[FileContent | DirectoryListing]:
    """The call of ``read_path``."""
    query = {"path": path, "max_bytes": max_bytes}

    def read(answer: Answer) -> FileContent | DirectoryListing:
        return parse_content(path, answer.headers, answer.content)

    return Call("GET", f"/sandboxes/{sandbox_id}/files", read, query=query)


def write_file(
    sandbox_id: str, path: str, content: bytes | Iterable[bytes], *, mode: int | None = None
) -> Call[int]:
    """The call of ``write_file``."""
    query = {"path": path} if mode is None else {"path": path, "mode": f"{mode:o}"}

    def read(answer: Answer) -> int:
        return parse(WrittenFile, answer.content).size

    return Call("PUT", f"/sandboxes/{sandbox_id}/files", read, content, query)


def delete_path(sandbox_id: str, path: str) -> Call[None]:
    """The call of ``delete_path``."""
    return Call("DELETE", f"/sandboxes/{sandbox_id}/files", nothing, query={"path": path})


def mkdir(sandbox_id: str, path: str, *, parents: bool = True) -> Call[None]:
    """The call of ``mkdir``."""
    content = encode(MakeDirectory(path, parents))
    return Call("POST", f"/sandboxes/{sandbox_id}/files/mkdir", nothing, content)


def move(sandbox_id: str, source: str, destination: str) -> Call[None]:
    """The call of ``move``."""
    content = encode(MoveFile(source, destination))
    return Call("POST", f"/sandboxes/{sandbox_id}/files/move", nothing, content)


def edit_file(sandbox_id: str, request: EditFile) -> Call[EditedFile]:
    """The call of ``edit_file``."""
    target = f"/sandboxes/{sandbox_id}/files/edit"
    return Call("POST", target, message(EditedFile), encode(request))


def stat(sandbox_id: str, path: str) -> Call[FileStat]:
    """The call of ``stat``."""
    target = f"/sandboxes/{sandbox_id}/files/stat"
    return Call("GET", target, message(FileStat), query={"path": path})
