"""The client of the host agent: typed answers in, :mod:`hostruntime.errors` out.

:class:`HostClient` is synchronous, for services and tasks.  :class:`AsyncHostClient` is for what
streams inside an event loop.  Both keep their connections: make one per process and socket with
:func:`host_client` / :func:`async_host_client`, which are safe across forks and event loops.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx

from hostruntime.client.answers import (
    BaseInfo,
    BuildEvent,
    BuildInfo,
    ChangesInfo,
    DirectoryListing,
    EgressDecision,
    EgressHost,
    ExecFrame,
    ExecResult,
    FileContent,
    FileStat,
    Health,
    ImageInfo,
    ImageUsage,
    Progress,
    SandboxInfo,
    UsageInfo,
)
from hostruntime.client.keeping import KeepingCalls
from hostruntime.client.snapshots import CAPTURE_TIMEOUT, SnapshotCalls
from hostruntime.client.wire import (
    Collected,
    content_of,
    error_of,
    errors_told,
    exec_body,
    stat_of,
    timeouts,
)
from hostruntime.errors import HostError
from hostruntime.host.quotas import Quota

DEFAULT_MAX_OUTPUT_BYTES = 16 * 1024 * 1024
DEFAULT_MAX_FILE_BYTES = 16 * 1024 * 1024
# A stream says something at least every 10 s (a blank line), so silence means a dead agent.
_TIMEOUT = timeouts(read=60.0)
_STREAM_TIMEOUT = timeouts(read=30.0)
# What an answer that was waited for on purpose may take beyond that.
_ANSWER_SECONDS = 5.0
# As many as are asked for: whoever asks has a bound of their own, and a command keeps one for as
# long as it runs.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=60.0)


class HostClient(SnapshotCalls, KeepingCalls):
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

    def __enter__(self) -> HostClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # The host ------------------------------------------------------------------------------

    def health(self, *, seconds: float = 60.0) -> Health:
        """What the agent is and how it is; it has so long to answer (:func:`timeouts`)."""
        return Health.from_wire(self._json("GET", "/health", timeout=timeouts(read=seconds)))

    def default_domains(self) -> list[str]:
        """The default allowlist of the restricted network."""
        return [str(name) for name in self._json("GET", "/egress/defaults")["domains"]]

    def egress_decisions(self, owner: str, since: float = 0.0) -> list[EgressDecision]:
        """What the proxy let through or refused for a sandbox or build since a Unix time."""
        params = {"owner": owner, "since": since}
        answer = self._json("GET", "/egress/decisions", params=params)
        return [EgressDecision.from_wire(item) for item in answer["decisions"]]

    def egress_hosts(self, owner: str) -> list[EgressHost]:
        """What a sandbox or build did with each host, refused ones first."""
        answer = self._json("GET", "/egress/hosts", params={"owner": owner})
        return [EgressHost.from_wire(item) for item in answer["hosts"]]

    # Images --------------------------------------------------------------------------------

    def bases(self) -> list[BaseInfo]:
        """The built-in bases and whether they are ready."""
        return [BaseInfo.from_wire(item) for item in self._json("GET", "/bases")["bases"]]

    def ensure_base(self, name: str) -> Iterator[Progress]:
        """Build a base unless it is ready, yielding progress; ends with a ``done`` line.

        Raises the failure as HostError.
        """
        for line in self._lines("POST", f"/bases/{name}"):
            if line["kind"] == "error":
                raise HostError.from_wire(line)
            yield Progress(line["kind"], str(line.get("message", "")), line.get("image"))

    def images(self) -> list[ImageInfo]:
        """Every image of the store."""
        return [ImageInfo.from_wire(item) for item in self._json("GET", "/images")["images"]]

    def image(self, image_id: str) -> ImageInfo:
        """One image; raises NotFound."""
        return ImageInfo.from_wire(self._json("GET", f"/images/{image_id}"))

    def image_usage(self, image_id: str) -> ImageUsage:
        """What an image takes now, and what deleting it gives back; slow.  Raises NotFound."""
        return ImageUsage.from_wire(self._json("GET", f"/images/{image_id}/usage"))

    def delete_image(self, image_id: str) -> bool:
        """Delete an image; True when it is gone, False when its last user has to go first."""
        return self._send("DELETE", f"/images/{image_id}").status_code == 204

    # Builds --------------------------------------------------------------------------------

    def start_build(
        self,
        build_id: str,
        *,
        base_image: str,
        recipe: Sequence[str],
        network: str,
        allow_domains: Sequence[str] | None = None,
        cpu: float = 2.0,
        memory_mb: int = 4096,
        disk_mb: int | None = None,
        step_timeout_seconds: float = 600.0,
        build_timeout_seconds: float = 1800.0,
        cache: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> BuildInfo:
        """Start a build whose image will have its id; the same id again changes nothing.

        ``cache`` has ``scope`` (whose layers it keeps and may use: a plain name) and ``reuse``:
        whether steps that an earlier build of the scope ran the same way are not run again.
        ``env`` is baked into the image.
        """
        body = {
            "id": build_id,
            "base_image": base_image,
            "recipe": list(recipe),
            "network": network,
            "allow_domains": None if allow_domains is None else list(allow_domains),
            "limits": {"cpu": cpu, "memory_mb": memory_mb, "disk_mb": disk_mb},
            "step_timeout_seconds": step_timeout_seconds,
            "build_timeout_seconds": build_timeout_seconds,
            "cache": None if cache is None else dict(cache),
            "env": dict(env or {}),
        }
        return BuildInfo.from_wire(self._json("POST", "/builds", body=body))

    def build(self, build_id: str) -> BuildInfo:
        """A build's state; raises NotFound."""
        return BuildInfo.from_wire(self._json("GET", f"/builds/{build_id}"))

    def cancel_build(self, build_id: str, *, keep_published: bool = False) -> BuildInfo:
        """Cancel a build; return how it ended, when all of it is gone.

        What it had published is deleted too, unless ``keep_published``: an answer of
        ``published`` then says that the cancellation came too late, and the image stays.
        """
        params = {"keep_published": "true" if keep_published else "false"}
        return BuildInfo.from_wire(self._json("DELETE", f"/builds/{build_id}", params=params))

    def drop_layers(self, scope: str) -> None:
        """Delete everything that builds of a scope kept for others to reuse."""
        self._send("DELETE", f"/layers/{scope}")

    def build_events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> Iterator[BuildEvent]:
        """The events after number ``after``; with ``follow``, until the terminal one."""
        params = {"after": after, "follow": "true" if follow else "false"}
        for line in self._lines("GET", f"/builds/{build_id}/events", params=params):
            yield BuildEvent.from_wire(line)

    # Sandboxes -----------------------------------------------------------------------------

    def sandboxes(self) -> list[SandboxInfo]:
        """Every sandbox the host knows, gone ones included for a day."""
        answer = self._json("GET", "/sandboxes")
        return [SandboxInfo.from_wire(item) for item in answer["sandboxes"]]

    def changes(self, run: str, after: int, *, seconds: float) -> ChangesInfo:
        """Which sandboxes ended, or were paused or resumed, after number ``after`` of a ``run``.

        That is one of the agent's.  Waits so long for the first, and not at all in another run.
        """
        params = {"run": run, "after": after, "seconds": seconds}
        timeout = timeouts(read=seconds + _ANSWER_SECONDS)
        return ChangesInfo.from_wire(self._json("GET", "/changes", params=params, timeout=timeout))

    def create_sandbox(
        self,
        sandbox_id: str,
        *,
        image: str | None = None,
        snapshot: str | None = None,
        cpu: float,
        memory_mb: int,
        disk_mb: int | None = None,
        network: str = "off",
        allow_domains: Sequence[str] | None = None,
        env: Mapping[str, str] | None = None,
        deadline: float | None = None,
    ) -> SandboxInfo:
        """Start a sandbox; the same id again answers the one there is.

        From an ``image``, or a ``snapshot``, which has a disk of its size.  Without ``disk_mb`` an
        image's is ten times its memory, 4 to 20 GiB.  Raises ImageNotFound, NotFound (no such
        snapshot), HostFull (nothing was created), InvalidRequest.
        """
        body = {
            "id": sandbox_id,
            "image": image,
            "snapshot": snapshot,
            "limits": {"cpu": cpu, "memory_mb": memory_mb, "disk_mb": disk_mb},
            "network": network,
            "allow_domains": None if allow_domains is None else list(allow_domains),
            "env": dict(env or {}),
            "deadline": deadline,
        }
        # All of a snapshot's disk is copied before the answer comes.
        timeout = _TIMEOUT if snapshot is None else CAPTURE_TIMEOUT
        answer = self._json("POST", "/sandboxes", body=body, timeout=timeout)
        return SandboxInfo.from_wire(answer)

    def sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox; raises NotFound."""
        return SandboxInfo.from_wire(self._json("GET", f"/sandboxes/{sandbox_id}"))

    def set_deadline(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Set when it ends (Unix seconds; None = never); raises NotFound, ContainerGone."""
        body = {"deadline": deadline}
        return SandboxInfo.from_wire(self._json("PATCH", f"/sandboxes/{sandbox_id}", body=body))

    def pause_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Freeze a sandbox; it ends at ``deadline`` unless it is resumed (Unix seconds).

        Idempotent.  Raises NotFound, ContainerGone, HostFault (then it runs on).
        """
        path, body = f"/sandboxes/{sandbox_id}/pause", {"deadline": deadline}
        return SandboxInfo.from_wire(self._json("POST", path, body=body))

    def resume_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Let a paused sandbox run on until ``deadline``.  Raises NotFound, ContainerGone."""
        path, body = f"/sandboxes/{sandbox_id}/resume", {"deadline": deadline}
        return SandboxInfo.from_wire(self._json("POST", path, body=body))

    def delete_sandbox(self, sandbox_id: str) -> None:
        """Terminate a sandbox and forget it; idempotent."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}")

    def exec(
        self,
        sandbox_id: str,
        command: str | Sequence[str],
        *,
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = 60.0,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
    ) -> ExecResult:
        """Run a command to its end: a string through the shell, a list as it is.

        At most ``max_output_bytes`` of stdout and stderr together are kept (16 MiB by default);
        more is dropped and ``truncated`` set.  Raises ExecTimeout (its ``extra`` holds the
        ``stdout`` and ``stderr`` so far, as bytes), CwdNotFound, NotFound, ContainerGone.
        """
        body = exec_body(command, cwd, env, timeout_seconds, max_output_bytes)
        collected = Collected()
        for line in self._lines("POST", f"/sandboxes/{sandbox_id}/exec", body=body):
            collected.add(ExecFrame.from_wire(line))
        return collected.result()

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """How many commands run of each scope that has any; it has so long to answer."""
        answer = self._json("GET", "/commands", timeout=timeouts(read=seconds))
        return {str(scope): int(many) for scope, many in answer["scopes"].items()}

    # Usage ---------------------------------------------------------------------------------

    def usage(self, sandbox_id: str | None = None) -> list[UsageInfo]:
        """What each sandbox has used, ended ones until collected; or that of one, if known."""
        params = {} if sandbox_id is None else {"id": sandbox_id}
        answer = self._json("GET", "/usage", params=params)
        return [UsageInfo.from_wire(item) for item in answer["sandboxes"]]

    def usage_collected(self, ids: Sequence[str]) -> None:
        """Have the host forget what these used, as far as they have ended."""
        self._send("POST", "/usage/collected", body={"ids": list(ids)})

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
        answer = self._json("PUT", f"/sandboxes/{sandbox_id}/files", params=params, content=content)
        return int(answer["size"])

    def delete_path(self, sandbox_id: str, path: str) -> None:
        """Delete a file, link or whole directory; raises NotFound, FileConflict."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}/files", params={"path": path})

    def mkdir(self, sandbox_id: str, path: str, *, parents: bool = True) -> None:
        """Make a directory; with ``parents``, also what is missing above, and existing is fine."""
        body = {"path": path, "parents": parents}
        self._send("POST", f"/sandboxes/{sandbox_id}/files/mkdir", body=body)

    def move(self, sandbox_id: str, source: str, destination: str) -> None:
        """Rename, replacing a file at the destination; raises NotFound, FileConflict."""
        body = {"source": source, "destination": destination}
        self._send("POST", f"/sandboxes/{sandbox_id}/files/move", body=body)

    def stat(self, sandbox_id: str, path: str) -> FileStat:
        """What is at a path; missing is ``exists=False``, not an error."""
        params = {"path": path}
        answer = self._json("GET", f"/sandboxes/{sandbox_id}/files/stat", params=params)
        return FileStat.from_wire(answer)

    # Plumbing ------------------------------------------------------------------------------

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        content: bytes | Iterable[bytes] | None = None,
        timeout: httpx.Timeout = _TIMEOUT,
    ) -> httpx.Response:
        with errors_told(self.socket):
            response = self._http.request(
                method, path, params=params, json=body, content=content, timeout=timeout
            )
        if response.is_error:
            raise error_of(response)
        return response

    def _json(self, method: str, path: str, **request: Any) -> dict[str, Any]:
        answer = self._send(method, path, **request).json()
        return answer if isinstance(answer, dict) else {}

    def _lines(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        with (
            errors_told(self.socket),
            self._http.stream(
                method, path, params=params, json=body, timeout=_STREAM_TIMEOUT
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise error_of(response)
            for line in response.iter_lines():
                if line.strip():
                    yield json.loads(line)


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

    async def __aenter__(self) -> AsyncHostClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def exec_frames(
        self,
        sandbox_id: str,
        command: str | Sequence[str],
        *,
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = 60.0,
        max_output_bytes: int | None = None,
        quota: Quota | None = None,
    ) -> AsyncIterator[ExecFrame]:
        """Run a command, yielding its frames; close the iterator early to kill it.

        A frame of kind ``error`` or ``exited`` is the last.  Raises only what happened before
        the command started; TooManyCommands if it would be one more than ``quota`` allows.
        """
        body = exec_body(command, cwd, env, timeout_seconds, max_output_bytes, quota)
        async with self._stream("POST", f"/sandboxes/{sandbox_id}/exec", json=body) as response:
            async for line in response.aiter_lines():
                if line.strip():
                    yield ExecFrame.from_wire(json.loads(line))

    async def exec_to_end(
        self,
        sandbox_id: str,
        command: str | Sequence[str],
        *,
        cwd: str = "/workspace",
        env: Mapping[str, str] | None = None,
        timeout_seconds: float | None = 60.0,
        max_output_bytes: int = DEFAULT_MAX_OUTPUT_BYTES,
        quota: Quota | None = None,
    ) -> ExecResult:
        """As :meth:`HostClient.exec`, within a ``quota``; cancelled, it ends the command."""
        frames = self.exec_frames(
            sandbox_id,
            command,
            cwd=cwd,
            env=env,
            timeout_seconds=timeout_seconds,
            max_output_bytes=max_output_bytes,
            quota=quota,
        )
        collected = Collected()
        # An async generator, whatever its annotation says: closing it ends the command.
        async with aclosing(cast("AsyncGenerator[ExecFrame]", frames)) as stream:
            async for frame in stream:
                collected.add(frame)
        return collected.result()

    async def build_events(self, build_id: str, after: int = 0) -> AsyncIterator[BuildEvent]:
        """The events after number ``after``, until the terminal one."""
        params = {"after": str(after), "follow": "true"}
        path = f"/builds/{build_id}/events"
        async with self._stream("GET", path, params=params) as response:
            async for line in response.aiter_lines():
                if line.strip():
                    yield BuildEvent.from_wire(json.loads(line))

    @asynccontextmanager
    async def open_file(
        self, sandbox_id: str, path: str
    ) -> AsyncIterator[tuple[FileStat, AsyncIterator[bytes]]]:
        """A file's stat and its bytes as they come, of any size; raises as read_path does."""
        params = {"path": path, "directories": "false"}
        url = f"/sandboxes/{sandbox_id}/files"
        async with self._stream("GET", url, params=params) as response:
            yield stat_of(path, response.headers), response.aiter_raw()

    async def write_file(
        self, sandbox_id: str, path: str, content: AsyncIterator[bytes], *, mode: int | None = None
    ) -> int:
        """Write a file of any size from a stream, whole or not at all; return its size."""
        params = {"path": path} if mode is None else {"path": path, "mode": f"{mode:o}"}
        url = f"/sandboxes/{sandbox_id}/files"
        async with self._stream("PUT", url, params=params, content=content) as response:
            answer = json.loads(await response.aread())
        return int(answer["size"])

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
