"""The client of the host agent: typed answers in, :mod:`hostruntime.errors` out.

:class:`HostClient` is synchronous, for services and tasks.  :class:`AsyncHostClient` is for what
streams inside an event loop.  Both keep their connections: make one per process and socket with
:func:`host_client` / :func:`async_host_client`, which are safe across forks and event loops.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import quote

import httpx

from hostruntime.client.transport import (
    Collected,
    content_of,
    error_of,
    errors_told,
    read,
    timeouts,
)
from hostruntime.errors import HostError
from hostruntime.wire.builds import BuildEvent, BuildInfo, StartBuild
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult, RunningCommands
from hostruntime.wire.files import (
    DirectoryListing,
    FileContent,
    FileStat,
    MakeDirectory,
    MoveFile,
    WrittenFile,
)
from hostruntime.wire.health import (
    DefaultDomains,
    EgressHost,
    EgressHosts,
    Health,
)
from hostruntime.wire.images import BaseInfo, Bases, ImageInfo, Images, ImageUsage, Progress
from hostruntime.wire.keeping import (
    Agree,
    Claim,
    HeldInfo,
    Quarantine,
    Reconcile,
    Reconciliation,
    StandingInfo,
)
from hostruntime.wire.message import Message, encode
from hostruntime.wire.sandboxes import (
    ChangesInfo,
    CollectedUsage,
    CreateSandbox,
    CreateSnapshot,
    Sandboxes,
    SandboxInfo,
    SetDeadline,
    SnapshotInfo,
    Snapshots,
    Usage,
    UsageInfo,
)

DEFAULT_MAX_OUTPUT_BYTES = 16 * 1024 * 1024
DEFAULT_MAX_FILE_BYTES = 16 * 1024 * 1024
# A stream says something at least every 10 s (a blank line), so silence means a dead agent.
_TIMEOUT = timeouts(read=60.0)
_STREAM_TIMEOUT = timeouts(read=30.0)
# All of a disk is copied before the answer comes.
_COPY_TIMEOUT = timeouts(read=600.0)
# What an answer that was waited for on purpose may take beyond that.
_ANSWER_SECONDS = 5.0
# As many as are asked for: whoever asks has a bound of their own, and a command keeps one for as
# long as it runs.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=60.0)


class HostClient:
    """The agent behind a Unix socket.  Every method raises HostError; HostUnavailable when down.

    Thread-safe.  Close it with :meth:`close` or use it as a context manager.
    """

    def __init__(self, socket: Path | str) -> None:
        self.socket = Path(socket)
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket), limits=_LIMITS, verify=_no_tls()),
            base_url="http://host",
            timeout=_TIMEOUT,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # The host ------------------------------------------------------------------------------

    def health(self, *, seconds: float = 60.0) -> Health:
        """What the agent is and how it is; it has so long to answer (:func:`timeouts`)."""
        return self._get(Health, "/health", timeout=timeouts(read=seconds))

    def default_domains(self) -> list[str]:
        """The default allowlist of the restricted network."""
        return list(self._get(DefaultDomains, "/egress/defaults").domains)

    def egress_hosts(self, owner: str) -> list[EgressHost]:
        """What a sandbox or build did with each host, refused ones first."""
        return list(self._get(EgressHosts, "/egress/hosts", params={"owner": owner}).hosts)

    # Images --------------------------------------------------------------------------------

    def bases(self) -> list[BaseInfo]:
        """The built-in bases and whether they are ready."""
        return list(self._get(Bases, "/bases").bases)

    def ensure_base(self, name: str) -> Iterator[Progress]:
        """Build a base unless it is ready, yielding progress; ends with a ``done`` line.

        Raises the failure as HostError.
        """
        for line in self._lines(Progress, "POST", f"/bases/{name}"):
            if line.error is not None:
                raise HostError.from_wire(line.error)
            yield line

    def images(self) -> list[ImageInfo]:
        """Every image of the store."""
        return list(self._get(Images, "/images").images)

    def image(self, image_id: str) -> ImageInfo:
        """One image; raises NotFound."""
        return self._get(ImageInfo, f"/images/{image_id}")

    def image_usage(self, image_id: str) -> ImageUsage:
        """What an image takes now, and what deleting it gives back; slow.  Raises NotFound."""
        return self._get(ImageUsage, f"/images/{image_id}/usage")

    def delete_image(self, image_id: str) -> bool:
        """Delete an image; True when it is gone, False when its last user has to go first."""
        return self._send("DELETE", f"/images/{image_id}").status_code == 204

    # Builds --------------------------------------------------------------------------------

    def start_build(self, request: StartBuild) -> BuildInfo:
        """Start a build; the same id again changes nothing.  Raises InvalidRequest, HostFull."""
        return self._ask(BuildInfo, "POST", "/builds", request)

    def build(self, build_id: str) -> BuildInfo:
        """A build's state; raises NotFound."""
        return self._get(BuildInfo, f"/builds/{build_id}")

    def cancel_build(self, build_id: str, *, keep_published: bool = False) -> BuildInfo:
        """Cancel a build; return how it ended, when all of it is gone.

        What it had published is deleted too, unless ``keep_published``: an answer of
        ``published`` then says that the cancellation came too late, and the image stays.
        """
        params = {"keep_published": "true" if keep_published else "false"}
        return self._ask(BuildInfo, "DELETE", f"/builds/{build_id}", params=params)

    def build_events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> Iterator[BuildEvent]:
        """The events after number ``after``; with ``follow``, until the terminal one."""
        params = {"after": after, "follow": "true" if follow else "false"}
        yield from self._lines(BuildEvent, "GET", f"/builds/{build_id}/events", params=params)

    # Sandboxes -----------------------------------------------------------------------------

    def sandboxes(self) -> list[SandboxInfo]:
        """Every sandbox the host knows, gone ones included for a day."""
        return list(self._get(Sandboxes, "/sandboxes").sandboxes)

    def changes(self, run: str, after: int, *, seconds: float) -> ChangesInfo:
        """Which sandboxes ended, or were paused or resumed, after number ``after`` of a ``run``.

        That is one of the agent's.  Waits so long for the first, and not at all in another run.
        """
        params = {"run": run, "after": after, "seconds": seconds}
        timeout = timeouts(read=seconds + _ANSWER_SECONDS)
        return self._get(ChangesInfo, "/changes", params=params, timeout=timeout)

    def create_sandbox(self, request: CreateSandbox) -> SandboxInfo:
        """Start a sandbox; the same id again answers the one there is.

        Raises ImageNotFound, NotFound (no such snapshot), HostFull (nothing was created),
        InvalidRequest.
        """
        timeout = _TIMEOUT if request.snapshot is None else _COPY_TIMEOUT
        return self._ask(SandboxInfo, "POST", "/sandboxes", request, timeout=timeout)

    def sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox; raises NotFound."""
        return self._get(SandboxInfo, f"/sandboxes/{sandbox_id}")

    def set_deadline(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Set when it ends (Unix seconds; None = never); raises NotFound, ContainerGone."""
        path = f"/sandboxes/{sandbox_id}"
        return self._ask(SandboxInfo, "PATCH", path, SetDeadline(deadline))

    def pause_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Freeze a sandbox; it ends at ``deadline`` unless it is resumed (Unix seconds).

        Idempotent.  Raises NotFound, ContainerGone, HostFault (then it runs on).
        """
        path = f"/sandboxes/{sandbox_id}/pause"
        return self._ask(SandboxInfo, "POST", path, SetDeadline(deadline))

    def resume_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Let a paused sandbox run on until ``deadline``.  Raises NotFound, ContainerGone."""
        path = f"/sandboxes/{sandbox_id}/resume"
        return self._ask(SandboxInfo, "POST", path, SetDeadline(deadline))

    def delete_sandbox(self, sandbox_id: str) -> None:
        """Terminate a sandbox and forget it; idempotent."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}")

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """How many commands run of each scope that has any; it has so long to answer."""
        timeout = timeouts(read=seconds)
        return dict(self._get(RunningCommands, "/commands", timeout=timeout).scopes)

    # Usage ---------------------------------------------------------------------------------

    def usage(self, sandbox_id: str | None = None) -> list[UsageInfo]:
        """What each sandbox has used, ended ones until collected; or that of one, if known."""
        params = {} if sandbox_id is None else {"id": sandbox_id}
        return list(self._get(Usage, "/usage", params=params).sandboxes)

    def usage_collected(self, ids: Sequence[str]) -> None:
        """Have the host forget what these used, as far as they have ended."""
        self._send("POST", "/usage/collected", CollectedUsage(ids))

    # Snapshots -----------------------------------------------------------------------------

    def create_snapshot(self, snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        """Take a snapshot of a running sandbox's files; the same id again answers that there is.

        Raises NotFound, ContainerGone, Conflict (one is being taken), HostFull; then nothing was
        made.
        """
        path, request = f"/sandboxes/{sandbox_id}/snapshots", CreateSnapshot(snapshot_id)
        return self._ask(SnapshotInfo, "POST", path, request, timeout=_COPY_TIMEOUT)

    def snapshots(self) -> list[SnapshotInfo]:
        """Every snapshot on the host, oldest first."""
        return list(self._get(Snapshots, "/snapshots").snapshots)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, when nobody is just starting from it; idempotent."""
        self._send("DELETE", f"/snapshots/{snapshot_id}")

    # Files ---------------------------------------------------------------------------------

    def read_path(
        self, sandbox_id: str, path: str, *, max_bytes: int = DEFAULT_MAX_FILE_BYTES
    ) -> FileContent | DirectoryListing:
        """Read a file whole, or list a directory.

        Raises NotFound, FileConflict (neither file nor directory), FileTooLarge.
        """
        params = {"path": path, "max_bytes": max_bytes}
        response = self._send("GET", f"/sandboxes/{sandbox_id}/files", params=params)
        return content_of(path, response)

    def write_file(
        self,
        sandbox_id: str,
        path: str,
        content: bytes | Iterable[bytes],
        *,
        mode: int | None = None,
    ) -> int:
        """Write a file whole or not at all, making missing parents; return the bytes written.

        ``mode`` None keeps an existing file's mode, else 0o644.  Raises FileConflict (a directory
        or a special file is in the way), NoSpace.
        """
        params = {"path": path} if mode is None else {"path": path, "mode": f"{mode:o}"}
        path = f"/sandboxes/{sandbox_id}/files"
        response = self._send("PUT", path, params=params, content=content)
        return read(WrittenFile, response.content).size

    def delete_path(self, sandbox_id: str, path: str) -> None:
        """Delete a file, link or whole directory; raises NotFound, FileConflict."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}/files", params={"path": path})

    def mkdir(self, sandbox_id: str, path: str, *, parents: bool = True) -> None:
        """Make a directory; with ``parents``, also what is missing above, and existing is fine."""
        request = MakeDirectory(path, parents)
        self._send("POST", f"/sandboxes/{sandbox_id}/files/mkdir", request)

    def move(self, sandbox_id: str, source: str, destination: str) -> None:
        """Rename, replacing a file at the destination; raises NotFound, FileConflict."""
        request = MoveFile(source, destination)
        self._send("POST", f"/sandboxes/{sandbox_id}/files/move", request)

    def stat(self, sandbox_id: str, path: str) -> FileStat:
        """What is at a path; missing is ``exists=False``, not an error."""
        where = f"/sandboxes/{sandbox_id}/files/stat"
        return self._get(FileStat, where, params={"path": path})

    # What belongs to nobody ----------------------------------------------------------------

    def installation(self) -> StandingInfo:
        """Which installation the state directory says it is of."""
        return self._get(StandingInfo, "/installation")

    def agree(self, claim: Claim, *, known: bool | None = None) -> StandingInfo:
        """Tell of the database's new mark; ``known`` says whether it knows what the host holds.

        Raises StateUnclaimed (say what is ``known``), InstallationMismatch.
        """
        request = Agree(**asdict(claim), known=known)
        return self._ask(StandingInfo, "POST", "/installation/agree", request)

    def adopt(self, claim: Claim) -> StandingInfo:
        """An operator's word that database and state belong together."""
        return self._ask(StandingInfo, "POST", "/installation/adopt", claim)

    def reconcile(self, request: Reconcile) -> Reconciliation:
        """Set aside some of what is not among those named.  Raises InstallationMismatch."""
        return self._ask(Reconciliation, "POST", "/reconcile", request)

    def quarantine(self) -> list[HeldInfo]:
        """What was set aside, the oldest first."""
        return list(self._get(Quarantine, "/quarantine").quarantine)

    def restore_held(self, key: str) -> HeldInfo:
        """Put back what was set aside.  Raises NotFound, Conflict."""
        return self._ask(HeldInfo, "POST", f"/quarantine/{quote(key, safe='')}/restore")

    def delete_held(self, key: str) -> None:
        """Delete for good what was set aside.  Raises NotFound."""
        self._send("DELETE", f"/quarantine/{quote(key, safe='')}")

    # Plumbing ------------------------------------------------------------------------------

    def _send(
        self,
        method: str,
        path: str,
        request: Message | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        content: bytes | Iterable[bytes] | None = None,
        timeout: httpx.Timeout = _TIMEOUT,
    ) -> httpx.Response:
        body = content if request is None else encode(request)
        with errors_told(self.socket):
            response = self._http.request(
                method, path, params=params, content=body, timeout=timeout
            )
        if response.is_error:
            raise error_of(response)
        return response

    def _ask[M: Message](
        self, kind: type[M], method: str, path: str, request: Message | None = None, **how: Any
    ) -> M:
        return read(kind, self._send(method, path, request, **how).content)

    def _get[M: Message](self, kind: type[M], path: str, **how: Any) -> M:
        return self._ask(kind, "GET", path, **how)

    def _lines[M: Message](
        self,
        kind: type[M],
        method: str,
        path: str,
        request: Message | None = None,
        *,
        params: Mapping[str, Any] | None = None,
    ) -> Iterator[M]:
        body = None if request is None else encode(request)
        with (
            errors_told(self.socket),
            self._http.stream(
                method, path, params=params, content=body, timeout=_STREAM_TIMEOUT
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise error_of(response)
            for line in response.iter_lines():
                if line.strip():
                    yield read(kind, line)


class AsyncHostClient:
    """The agent, from inside an event loop: for what streams.  Errors as in HostClient."""

    def __init__(self, socket: Path | str) -> None:
        self.socket = Path(socket)
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(socket), limits=_LIMITS, verify=_no_tls()),
            base_url="http://host",
            timeout=_STREAM_TIMEOUT,
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def exec_frames(self, sandbox_id: str, request: Exec) -> AsyncIterator[ExecFrame]:
        """Run a command, yielding its frames; close the iterator early to kill it.

        A frame of kind ``error`` or ``exited`` is the last.  Raises only what happened before
        the command started; TooManyCommands if it would be one more than its quota allows.
        """
        path = f"/sandboxes/{sandbox_id}/exec"
        async with self._stream("POST", path, content=encode(request)) as response:
            async for line in response.aiter_lines():
                if line.strip():
                    yield read(ExecFrame, line)

    async def exec_to_end(self, sandbox_id: str, request: Exec) -> ExecResult:
        """Run a command to its end; cancelled, it ends the command.

        Of its output the first 16 MiB are kept unless the request says otherwise; more is dropped
        and ``truncated`` set.  Raises ExecTimeout (its ``extra`` holds the ``stdout`` and
        ``stderr`` so far, as bytes), CwdNotFound, NotFound, ContainerGone, and TooManyCommands if
        it would be one more than its quota allows.
        """
        collected, frames = Collected(), self.exec_frames(sandbox_id, capped(request))
        # An async generator, whatever its annotation says: closing it ends the command.
        async with aclosing(cast("AsyncGenerator[ExecFrame]", frames)) as stream:
            async for frame in stream:
                collected.add(frame)
        return collected.result()

    @asynccontextmanager
    async def _stream(
        self, method: str, path: str, **request: Any
    ) -> AsyncIterator[httpx.Response]:
        with errors_told(self.socket):
            async with self._http.stream(method, path, **request) as response:
                if response.is_error:
                    await response.aread()
                    raise error_of(response)
                yield response


def capped(request: Exec) -> Exec:
    """The same, for output that is kept in memory."""
    if request.max_output_bytes is not None:
        return request
    return replace(request, max_output_bytes=DEFAULT_MAX_OUTPUT_BYTES)


def _no_tls() -> ssl.SSLContext:
    # The socket is plain HTTP; an empty context spares httpx the 20 ms of loading the CA bundle.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


_clients: dict[tuple[int, str], HostClient] = {}
_clients_lock = threading.Lock()
_async_clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, AsyncHostClient]] = (
    weakref.WeakKeyDictionary()
)


def host_client(socket: Path | str) -> HostClient:
    """The process's client of this socket; a forked child gets its own connections."""
    key = (os.getpid(), str(socket))
    with _clients_lock:
        if key not in _clients:
            _clients[key] = HostClient(socket)
        return _clients[key]


def async_host_client(socket: Path | str) -> AsyncHostClient:
    """The running event loop's client of this socket."""
    of_loop = _async_clients.setdefault(asyncio.get_running_loop(), {})
    key = str(socket)
    if key not in of_loop:
        of_loop[key] = AsyncHostClient(socket)
    return of_loop[key]
