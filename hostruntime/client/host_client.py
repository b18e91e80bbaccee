"""The client of the host agent: typed responses, and :mod:`hostruntime.errors`.

It is synchronous, for services and tasks; :mod:`hostruntime.client.async_host_client` streams
inside an event loop.  It keeps its connections: get one per process and socket from
:func:`host_client`, which is safe across forks.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

from hostruntime.client.transport import (
    parse,
    parse_content,
    parse_error,
    timeouts,
    transport_errors,
)
from hostruntime.errors import HostError
from hostruntime.wire.builds import BuildEvent, BuildInfo, StartBuild
from hostruntime.wire.commands import RunningCommands
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
from hostruntime.wire.message import Message, encode
from hostruntime.wire.reconciliation import (
    Agree,
    Claim,
    InstallationInfo,
    Quarantine,
    QuarantinedItemInfo,
    Reconcile,
    Reconciliation,
)
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

DEFAULT_MAX_FILE_BYTES = 16 * 1024 * 1024
# A stream sends something at least every 10 s (an empty line), so silence means a dead agent.
_TIMEOUT = timeouts(read=60.0)
_STREAM_TIMEOUT = timeouts(read=30.0)
# A whole disk is copied before the response is sent.
_COPY_TIMEOUT = timeouts(read=600.0)
# Added to the requested wait of a long poll.
_RESPONSE_SECONDS = 5.0
# Unlimited connections: callers have their own limits, and a command keeps one while it runs.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=32, keepalive_expiry=60.0)


class HostClient:
    """The agent behind a Unix socket.  Every method raises HostError; HostUnavailable if down.

    Thread-safe.  Close it with :meth:`close` or use it as a context manager.
    """

    def __init__(self, socket: Path | str) -> None:
        self.socket = Path(socket)
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(
                uds=str(socket), limits=_LIMITS, verify=_empty_tls_context()
            ),
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
        """The agent's health; waits ``seconds`` for the response (:func:`timeouts`)."""
        return self._get(Health, "/health", timeout=timeouts(read=seconds))

    def default_domains(self) -> list[str]:
        """The default allowlist of the restricted network."""
        return list(self._get(DefaultDomains, "/egress/defaults").domains)

    def egress_hosts(self, owner: str) -> list[EgressHost]:
        """The requests of a sandbox or build by host, refused ones first."""
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
        """Every image in the store."""
        return list(self._get(Images, "/images").images)

    def image(self, image_id: str) -> ImageInfo:
        """One image; raises NotFound."""
        return self._get(ImageInfo, f"/images/{image_id}")

    def image_usage(self, image_id: str) -> ImageUsage:
        """An image's disk usage, and what deleting it frees; slow.  Raises NotFound."""
        return self._get(ImageUsage, f"/images/{image_id}/usage")

    def delete_image(self, image_id: str) -> bool:
        """Delete an image; True if it is deleted, False if that waits for its last user."""
        return self._send("DELETE", f"/images/{image_id}").status_code == 204

    # Builds --------------------------------------------------------------------------------

    def start_build(self, request: StartBuild) -> BuildInfo:
        """Start a build; idempotent by id.  Raises InvalidRequest, HostFull."""
        return self._request(BuildInfo, "POST", "/builds", request)

    def build(self, build_id: str) -> BuildInfo:
        """A build's state; raises NotFound."""
        return self._get(BuildInfo, f"/builds/{build_id}")

    def cancel_build(self, build_id: str, *, keep_published: bool = False) -> BuildInfo:
        """Cancel a build; return how it ended, once it has been cleaned up.

        An image that it had published is deleted too, unless ``keep_published``: the state
        ``published`` then means that the cancellation came too late, and the image stays.
        """
        params = {"keep_published": "true" if keep_published else "false"}
        return self._request(BuildInfo, "DELETE", f"/builds/{build_id}", params=params)

    def build_events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> Iterator[BuildEvent]:
        """The events after number ``after``; with ``follow``, until the terminal one."""
        params = {"after": after, "follow": "true" if follow else "false"}
        yield from self._lines(BuildEvent, "GET", f"/builds/{build_id}/events", params=params)

    # Sandboxes -----------------------------------------------------------------------------

    def sandboxes(self) -> list[SandboxInfo]:
        """Every sandbox on the host, including those that ended within the last day."""
        return list(self._get(Sandboxes, "/sandboxes").sandboxes)

    def changes(self, run: str, after: int, *, seconds: float) -> ChangesInfo:
        """Sandboxes that ended, were paused or resumed after number ``after`` of ``run``.

        Waits ``seconds`` for the first, and not at all if the agent is in another run.
        """
        params = {"run": run, "after": after, "seconds": seconds}
        timeout = timeouts(read=seconds + _RESPONSE_SECONDS)
        return self._get(ChangesInfo, "/changes", params=params, timeout=timeout)

    def create_sandbox(self, request: CreateSandbox) -> SandboxInfo:
        """Start a sandbox; the same id again returns the existing one.

        Raises ImageNotFound, NotFound (no such snapshot), HostFull (nothing was created),
        InvalidRequest.
        """
        timeout = _TIMEOUT if request.snapshot is None else _COPY_TIMEOUT
        return self._request(SandboxInfo, "POST", "/sandboxes", request, timeout=timeout)

    def sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox; raises NotFound."""
        return self._get(SandboxInfo, f"/sandboxes/{sandbox_id}")

    def set_deadline(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Set when it ends (Unix seconds; None = never); raises NotFound, ContainerGone."""
        path = f"/sandboxes/{sandbox_id}"
        return self._request(SandboxInfo, "PATCH", path, SetDeadline(deadline))

    def pause_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Freeze a sandbox; it ends at ``deadline`` unless it is resumed (Unix seconds).

        Idempotent.  Raises NotFound, ContainerGone, HostFault (then it keeps running).
        """
        path = f"/sandboxes/{sandbox_id}/pause"
        return self._request(SandboxInfo, "POST", path, SetDeadline(deadline))

    def resume_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Resume a paused sandbox until ``deadline``.  Raises NotFound, ContainerGone."""
        path = f"/sandboxes/{sandbox_id}/resume"
        return self._request(SandboxInfo, "POST", path, SetDeadline(deadline))

    def delete_sandbox(self, sandbox_id: str) -> None:
        """Terminate and delete a sandbox; idempotent."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}")

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """The number of running commands by scope; waits ``seconds`` for the response."""
        timeout = timeouts(read=seconds)
        return dict(self._get(RunningCommands, "/commands", timeout=timeout).scopes)

    # Usage ---------------------------------------------------------------------------------

    def usage(self, sandbox_id: str | None = None) -> list[UsageInfo]:
        """The usage of all sandboxes, including uncollected ended ones, or of one."""
        params = {} if sandbox_id is None else {"id": sandbox_id}
        return list(self._get(Usage, "/usage", params=params).sandboxes)

    def acknowledge_usage(self, ids: Sequence[str]) -> None:
        """Let the host delete the usage of those of these sandboxes that have ended."""
        self._send("POST", "/usage/collected", CollectedUsage(ids))

    # Snapshots -----------------------------------------------------------------------------

    def create_snapshot(self, snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        """Take a snapshot of a running sandbox's files; the same id again returns the existing one.

        Raises NotFound, ContainerGone, Conflict (one is being taken), HostFull; then nothing was
        created.
        """
        path, request = f"/sandboxes/{sandbox_id}/snapshots", CreateSnapshot(snapshot_id)
        return self._request(SnapshotInfo, "POST", path, request, timeout=_COPY_TIMEOUT)

    def snapshots(self) -> list[SnapshotInfo]:
        """Every snapshot on the host, oldest first."""
        return list(self._get(Snapshots, "/snapshots").snapshots)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, once no sandbox is being started from it; idempotent."""
        self._send("DELETE", f"/snapshots/{snapshot_id}")

    # Files ---------------------------------------------------------------------------------

    def read_path(
        self, sandbox_id: str, path: str, *, max_bytes: int = DEFAULT_MAX_FILE_BYTES
    ) -> FileContent | DirectoryListing:
        """Read a complete file, or list a directory.

        Raises NotFound, FileConflict (neither file nor directory), FileTooLarge.
        """
        params = {"path": path, "max_bytes": max_bytes}
        response = self._send("GET", f"/sandboxes/{sandbox_id}/files", params=params)
        return parse_content(path, response)

    def write_file(
        self,
        sandbox_id: str,
        path: str,
        content: bytes | Iterable[bytes],
        *,
        mode: int | None = None,
    ) -> int:
        """Write a file atomically, creating missing parents; return the bytes written.

        ``mode`` None keeps an existing file's mode, else 0o644.  Raises FileConflict (the path is
        a directory or a special file), NoSpace.
        """
        params = {"path": path} if mode is None else {"path": path, "mode": f"{mode:o}"}
        path = f"/sandboxes/{sandbox_id}/files"
        response = self._send("PUT", path, params=params, content=content)
        return parse(WrittenFile, response.content).size

    def delete_path(self, sandbox_id: str, path: str) -> None:
        """Delete a file, link or whole directory; raises NotFound, FileConflict."""
        self._send("DELETE", f"/sandboxes/{sandbox_id}/files", params={"path": path})

    def mkdir(self, sandbox_id: str, path: str, *, parents: bool = True) -> None:
        """Create a directory; with ``parents``, also missing parents, and it may exist already."""
        request = MakeDirectory(path, parents)
        self._send("POST", f"/sandboxes/{sandbox_id}/files/mkdir", request)

    def move(self, sandbox_id: str, source: str, destination: str) -> None:
        """Rename, replacing a file at the destination; raises NotFound, FileConflict."""
        request = MoveFile(source, destination)
        self._send("POST", f"/sandboxes/{sandbox_id}/files/move", request)

    def stat(self, sandbox_id: str, path: str) -> FileStat:
        """The stat of a path; a missing path is ``exists=False``, not an error."""
        url = f"/sandboxes/{sandbox_id}/files/stat"
        return self._get(FileStat, url, params={"path": path})

    # Reconciliation ------------------------------------------------------------------------

    def installation(self) -> InstallationInfo:
        """Which installation the state directory belongs to."""
        return self._get(InstallationInfo, "/installation")

    def agree(self, claim: Claim, *, known: bool | None = None) -> InstallationInfo:
        """Send the database's new mark; ``known`` says whether it knows what the host holds.

        Raises StateUnclaimed (retry with ``known``), InstallationMismatch.
        """
        request = Agree(**asdict(claim), known=known)
        return self._request(InstallationInfo, "POST", "/installation/agree", request)

    def adopt(self, claim: Claim) -> InstallationInfo:
        """Confirm for an operator that the database and the state belong together."""
        return self._request(InstallationInfo, "POST", "/installation/adopt", claim)

    def reconcile(self, request: Reconcile) -> Reconciliation:
        """Set aside some of what the request does not name.  Raises InstallationMismatch."""
        return self._request(Reconciliation, "POST", "/reconcile", request)

    def quarantine(self) -> list[QuarantinedItemInfo]:
        """Everything in quarantine, oldest first."""
        return list(self._get(Quarantine, "/quarantine").quarantine)

    def restore_quarantined(self, key: str) -> QuarantinedItemInfo:
        """Restore an item from quarantine.  Raises NotFound, Conflict."""
        return self._request(
            QuarantinedItemInfo, "POST", f"/quarantine/{quote(key, safe='')}/restore"
        )

    def delete_quarantined(self, key: str) -> None:
        """Delete an item in quarantine permanently.  Raises NotFound."""
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
        with transport_errors(self.socket):
            response = self._http.request(
                method, path, params=params, content=body, timeout=timeout
            )
        if response.is_error:
            raise parse_error(response.status_code, response.content)
        return response

    def _request[M: Message](
        self, kind: type[M], method: str, path: str, request: Message | None = None, **options: Any
    ) -> M:
        return parse(kind, self._send(method, path, request, **options).content)

    def _get[M: Message](self, kind: type[M], path: str, **options: Any) -> M:
        return self._request(kind, "GET", path, **options)

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
            transport_errors(self.socket),
            self._http.stream(
                method, path, params=params, content=body, timeout=_STREAM_TIMEOUT
            ) as response,
        ):
            if response.is_error:
                response.read()
                raise parse_error(response.status_code, response.content)
            for line in response.iter_lines():
                if line.strip():
                    yield parse(kind, line)


def _empty_tls_context() -> ssl.SSLContext:
    # The socket is plain HTTP; an empty context spares httpx the 20 ms of loading the CA bundle.
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


_clients: dict[tuple[int, str], HostClient] = {}
_clients_lock = threading.Lock()


def host_client(socket: Path | str) -> HostClient:
    """The process's client for this socket; a forked child gets its own connections."""
    key = (os.getpid(), str(socket))
    with _clients_lock:
        if key not in _clients:
            _clients[key] = HostClient(socket)
        return _clients[key]
