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

from hostruntime.client import calls
from hostruntime.client.calls import DEFAULT_MAX_FILE_BYTES, SILENCE_SECONDS, Call
from hostruntime.client.transport import (
    parse,
    parse_error,
    timeouts,
    transport_errors,
)
from hostruntime.errors import HostError
from hostruntime.wire.background import CommandInfo, CommandOutput, StartCommand
from hostruntime.wire.builds import BuildEvent, BuildInfo, StartBuild
from hostruntime.wire.commands import RunningCommands
from hostruntime.wire.files import (
    DirectoryListing,
    EditedFile,
    EditFile,
    FileContent,
    FileStat,
)
from hostruntime.wire.health import (
    DefaultDomains,
    EgressHost,
    EgressHosts,
    Health,
)
from hostruntime.wire.images import BaseInfo, ImageInfo, Images, ImageUsage, Progress
from hostruntime.wire.interpreter import ContextInfo, CreateContext
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
    CreateSandbox,
    MetricsPoint,
    Sandboxes,
    SandboxInfo,
    SandboxMetrics,
    SnapshotInfo,
    Snapshots,
    UsageInfo,
)
from hostruntime.wire.volumes import VolumeInfo, Volumes

# A stream sends something at least every 10 s (an empty line), so silence means a dead agent.
_TIMEOUT = timeouts(read=SILENCE_SECONDS)
_STREAM_TIMEOUT = timeouts(read=30.0)
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
        return self._perform(calls.bases())

    def ensure_base(self, name: str) -> Iterator[Progress]:
        """Build a base unless it is ready, yielding progress; ends with a ``done`` line.

        One without a message says, every ten seconds, that there is nothing new: whoever no longer
        wants to know can leave.  Raises the failure as HostError.
        """
        for line in self._lines(Progress, "POST", f"/bases/{name}", idle=Progress("progress")):
            if line.error is not None:
                raise HostError.from_wire(line.error)
            yield line

    def request_base(self, name: str) -> BaseInfo:
        """Have a base built unless it is ready, without waiting; raises ImageNotFound."""
        return self._perform(calls.request_base(name))

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
        InvalidRequest, VolumeMissing, VolumeInUse, VolumeDamaged.
        """
        return self._perform(calls.create_sandbox(request))

    def sandbox(self, sandbox_id: str) -> SandboxInfo:
        """One sandbox; raises NotFound."""
        return self._perform(calls.sandbox(sandbox_id))

    def set_deadline(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Set when it ends (Unix seconds; None = never); raises NotFound, ContainerGone."""
        return self._perform(calls.set_deadline(sandbox_id, deadline))

    def pause_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Freeze a sandbox; it ends at ``deadline`` unless it is resumed (Unix seconds).

        Idempotent.  Raises NotFound, ContainerGone, HostFault (then it keeps running).
        """
        return self._perform(calls.pause_sandbox(sandbox_id, deadline))

    def resume_sandbox(self, sandbox_id: str, deadline: float | None) -> SandboxInfo:
        """Resume a paused sandbox until ``deadline``.  Raises NotFound, ContainerGone."""
        return self._perform(calls.resume_sandbox(sandbox_id, deadline))

    def delete_sandbox(self, sandbox_id: str, collected: Sequence[str] = ()) -> UsageInfo | None:
        """Terminate and delete a sandbox; idempotent.

        Returns its usage, unless that was collected before.  Also lets the host delete the usage
        of those that are named as ``collected`` (:meth:`acknowledge_usage`), as far as it can.
        """
        return self._perform(calls.delete_sandbox(sandbox_id, collected))

    def commands(self, *, seconds: float = 60.0) -> dict[str, int]:
        """The number of running commands by scope; waits ``seconds`` for the response."""
        timeout = timeouts(read=seconds)
        return dict(self._get(RunningCommands, "/commands", timeout=timeout).scopes)

    # Background commands -------------------------------------------------------------------

    def start_command(self, sandbox_id: str, request: StartCommand) -> CommandInfo:
        """Start a background command; the same id again returns that command.

        Raises NotFound, ContainerGone, ContainerPaused, TooManyCommands, CwdNotFound,
        NoSpace, Exhausted; then nothing was started.
        """
        return self._perform(calls.start_command(sandbox_id, request))

    def background_commands(self, sandbox_id: str) -> list[CommandInfo]:
        """A sandbox's background commands, the newest first."""
        return self._perform(calls.background_commands(sandbox_id))

    def command(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """One background command.  Raises NotFound, ContainerGone."""
        return self._perform(calls.command(sandbox_id, command_id))

    def kill_command(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """Kill a background command and all that it has started; idempotent."""
        return self._perform(calls.kill_command(sandbox_id, command_id))

    def command_output(
        self, sandbox_id: str, command_id: str, offset: int = 0, *, max_bytes: int | None = None
    ) -> CommandOutput:
        """A part of what a background command has printed; all that is kept, by default."""
        call = calls.command_output(sandbox_id, command_id, offset, max_bytes=max_bytes)
        return self._perform(call)

    # Code interpreter ----------------------------------------------------------------------

    def create_context(self, sandbox_id: str, request: CreateContext) -> ContextInfo:
        """Start a context; the same id again returns that context.

        Raises NotFound, ContainerGone, ContainerPaused, InterpreterUnavailable, KernelFailed,
        TooManyContexts, CwdNotFound, Exhausted; then nothing was started.
        """
        return self._perform(calls.create_context(sandbox_id, request))

    def contexts(self, sandbox_id: str) -> list[ContextInfo]:
        """A sandbox's contexts, the newest first."""
        return self._perform(calls.contexts(sandbox_id))

    def restart_context(self, sandbox_id: str, context_id: str) -> ContextInfo:
        """Give a context a new kernel.  Raises ContextNotFound, and like create_context."""
        return self._perform(calls.restart_context(sandbox_id, context_id))

    def remove_context(self, sandbox_id: str, context_id: str) -> None:
        """End a context.  Raises ContextNotFound, ContainerGone, ContainerPaused."""
        self._perform(calls.remove_context(sandbox_id, context_id))

    # Usage ---------------------------------------------------------------------------------

    def usage(self, sandbox_id: str | None = None) -> list[UsageInfo]:
        """The usage of all sandboxes, including uncollected ended ones, or of one."""
        return self._perform(calls.usage(sandbox_id))

    def metrics(self, sandbox_id: str) -> SandboxMetrics:
        """What a sandbox uses, and has used lately.  Raises NotFound, ContainerGone."""
        return self._perform(calls.metrics(sandbox_id))

    def metrics_history(self, sandbox_id: str, since: float = 0.0) -> list[MetricsPoint]:
        """What a sandbox has used since a Unix time, over its life; for a day after its end."""
        return self._perform(calls.metrics_history(sandbox_id, since))

    def acknowledge_usage(self, ids: Sequence[str]) -> None:
        """Let the host delete the usage of those of these sandboxes that have ended."""
        self._perform(calls.acknowledge_usage(ids))

    # Snapshots -----------------------------------------------------------------------------

    def create_snapshot(self, snapshot_id: str, sandbox_id: str) -> SnapshotInfo:
        """Take a snapshot of a running sandbox's files; the same id again returns the existing one.

        Raises NotFound, ContainerGone, Conflict (one is being taken), HostFull; then nothing was
        created.
        """
        return self._perform(calls.create_snapshot(snapshot_id, sandbox_id))

    def snapshots(self) -> list[SnapshotInfo]:
        """Every snapshot on the host, oldest first."""
        return list(self._get(Snapshots, "/snapshots").snapshots)

    def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete a snapshot, once no sandbox is being started from it; idempotent."""
        self._perform(calls.delete_snapshot(snapshot_id))

    # Volumes -------------------------------------------------------------------------------

    def volumes(self) -> list[VolumeInfo]:
        """Every volume on the host."""
        return list(self._get(Volumes, "/volumes").volumes)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume with all that is on it; idempotent.  Raises VolumeInUse."""
        self._perform(calls.delete_volume(volume_id))

    def copy_volume(self, volume_id: str) -> None:
        """Leave a copy beside the volume, for a backup to take away (:mod:`hostruntime.volume`).

        Raises VolumeMissing, HostFull, HostFault (it would take too long); then there is none.
        """
        self._perform(calls.copy_volume(volume_id))

    # Files ---------------------------------------------------------------------------------

    def read_path(
        self, sandbox_id: str, path: str, *, max_bytes: int = DEFAULT_MAX_FILE_BYTES
    ) -> FileContent | DirectoryListing:
        """Read a complete file, or list a directory.

        Raises NotFound, FileConflict (neither file nor directory), FileTooLarge.
        """
        return self._perform(calls.read_path(sandbox_id, path, max_bytes=max_bytes))

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
        return self._perform(calls.write_file(sandbox_id, path, content, mode=mode))

    def delete_path(self, sandbox_id: str, path: str) -> None:
        """Delete a file, link or whole directory; raises NotFound, FileConflict."""
        self._perform(calls.delete_path(sandbox_id, path))

    def mkdir(self, sandbox_id: str, path: str, *, parents: bool = True) -> None:
        """Create a directory; with ``parents``, also missing parents, and it may exist already."""
        self._perform(calls.mkdir(sandbox_id, path, parents=parents))

    def move(self, sandbox_id: str, source: str, destination: str) -> None:
        """Rename, replacing a file at the destination; raises NotFound, FileConflict."""
        self._perform(calls.move(sandbox_id, source, destination))

    def edit_file(self, sandbox_id: str, request: EditFile) -> EditedFile:
        """Replace text in a file atomically; its mode and owner stay.

        Raises NotFound, FileConflict, TextNotFound, FileTooLarge, NoSpace.
        """
        return self._perform(calls.edit_file(sandbox_id, request))

    def stat(self, sandbox_id: str, path: str) -> FileStat:
        """The stat of a path; a missing path is ``exists=False``, not an error."""
        return self._perform(calls.stat(sandbox_id, path))

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

    def _perform[R](self, call: Call[R]) -> R:
        timeout = timeouts(read=call.silence_seconds)
        return call.read(
            self._send(call.method, call.target, content=call.content or None, timeout=timeout)
        )

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
        idle: M | None = None,
    ) -> Iterator[M]:
        """The lines of an answer; ``idle`` for each that only keeps the connection alive."""
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
                elif idle is not None:
                    yield idle


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
