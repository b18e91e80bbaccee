"""Builds of templates: started once, followed by any number of clients, cancelled at any point.

A build is a directory ``builds/<id>/`` with ``build.json`` (the request, the state and, once it has
finished, the result) and ``events.ndjson``; while it runs also the container's directory. Its id is
that of the image it will publish. States: running, then published, failed or cancelled.

A build runs in the agent's process. If its record says running when the agent starts, it was
interrupted: it becomes ``failed`` with code ``host_lost``, unless its image was already published.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from pydantic import ConfigDict, TypeAdapter, with_config

from hostruntime.build.assembly import Assembly, Published
from hostruntime.build.log import EventLog
from hostruntime.build.plan import Host, Plan
from hostruntime.container.launcher import LauncherLost
from hostruntime.container.limits import Limits
from hostruntime.errors import (
    BuildFailed,
    HostError,
    HostFull,
    ImageNotFound,
    InvalidRequest,
    NotFound,
)
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import KeyedLocks, in_thread, log_errors, shielded
from hostruntime.image.environment import check_environment
from hostruntime.image.store import Image, check_name
from hostruntime.network.policy import Policy, PolicyError
from hostruntime.wire.builds import BuildInfo, StartBuild

State = Literal["running", "published", "failed", "cancelled"]
EndReason = Literal["cancelled", "host_lost", "no_room"]
MAX_STEP_BYTES = 256 * 1024
KEEP_SECONDS = 7 * 86_400.0
CANCELLED = "The build was cancelled."
HOST_LOST = (
    "The host agent stopped while the template was being built, so the build failed and left "
    "nothing behind. Rebuild the template."
)
NO_ROOM = (
    "The machine ran out of disk while the template was being built. The build used the most "
    "space, so it was stopped. Rebuild the template once the operator has freed some space."
)
LAUNCHER_LOST = (
    "The host's process that starts commands died while the template was being built, so the "
    "build failed and left nothing behind. Rebuild the template."
)
DEFECT = "The host could not finish the build due to a defect; its log has the details."
_RECORD, _EVENTS = "build.json", "events.ndjson"
_log = logging.getLogger(__name__)


# Other fields of a record are preserved.
@with_config(ConfigDict(**{**STRICT, "extra": "allow"}))
class _Record(TypedDict):
    """``build.json``."""

    id: str
    state: State
    created_at: float
    finished_at: NotRequired[float]
    request: NotRequired[dict[str, Any] | None]
    error: NotRequired[dict[str, Any] | None]


_RECORDS: TypeAdapter[_Record] = TypeAdapter(_Record)


@dataclass
class _Build:
    """A build in this process."""

    id: str
    directory: Path
    log: EventLog
    record: dict[str, Any]
    # The task that builds the image, and the one that waits for it and records the result.
    work: asyncio.Task[_BuildResult] | None = None
    task: asyncio.Task[None] | None = None
    end_reason: EndReason | None = None
    stopped: bool = False
    _final: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        state: State = self._current_record["state"]
        return state

    @property
    def _current_record(self) -> dict[str, Any]:
        """The record, including the final fields once followers see the terminal event."""
        return self.record | (self._final if self.log.terminal is not None else {})

    def status(self) -> BuildInfo:
        return BuildInfo(self.id, self.state, self.log.last_seq, self._current_record.get("error"))

    def save(self) -> None:
        """Write the record.  Blocks; raises OSError."""
        write_json(self.directory / _RECORD, self._current_record)

    async def override_state(self, state: State, error: Mapping[str, Any] | None) -> None:
        """Save another state than the one in the log."""
        self.record = self._current_record | {"state": state, "error": error}
        self._final = {}
        await in_thread(self.save)

    async def finish(self, state: State, kind: str, **fields: Any) -> None:
        """Write the terminal event, then the final state.  Raises OSError."""
        error = {key: value for key, value in fields.items() if value is not None}
        self._final = {
            "state": state,
            "finished_at": time.time(),
            "error": error if kind == "failed" else None,
        }
        save = partial(write_json, self.directory / _RECORD, self.record | self._final)
        await self.log.finish(kind, save, **(error if kind == "failed" else fields))


@dataclass(frozen=True)
class _BuildResult:
    """The result of a successful build, and how long it took, in seconds."""

    published: Published
    seconds: float


Builds = list[_Build]


class BuildManager:
    """The builds of one host, for use in one event loop; call :meth:`recover` first."""

    def __init__(self, paths: StatePaths, host: Host) -> None:
        self._directory = paths.builds
        self._host = host
        self._running: dict[str, _Build] = {}
        # By id: a build is started once, or cancelled before it starts.
        self._locks = KeyedLocks()

    # Requests -----------------------------------------------------------------------------

    async def start(self, request: StartBuild) -> tuple[BuildInfo, bool]:
        """Start a build; return its status, and whether it is new (the same id starts once).

        Raises InvalidRequest, and HostFull (nothing is recorded then) while there is no room.
        """
        return await shielded(self._start(request))

    async def _start(self, request: StartBuild) -> tuple[BuildInfo, bool]:
        async with self._locks.holding(request.id):
            known = await self._find(request.id)
            if known is not None:
                return known.status(), False
            policy = _validate(request)
            if request.cache is not None:
                check_name(request.cache.scope)
            await self._host.containers.admit(request.id, Limits.of(request))
            try:
                build = await in_thread(self._new, request.id, {"request": asdict(request)})
            except BaseException:
                self._host.containers.dismiss(request.id)
                raise
            self._running[build.id] = build
            work = self._run(build, request, policy)
            build.work = asyncio.create_task(work, name=f"build {request.id}")
            build.task = asyncio.create_task(self._supervise(build, request))
            return build.status(), True

    async def status(self, build_id: str) -> BuildInfo:
        """Return a build's state; raises NotFound."""
        return (await self._get(build_id)).status()

    async def events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> AsyncIterator[bytes]:
        """Return the events after ``after`` as NDJSON (:class:`EventLog`); raises NotFound."""
        return (await self._get(build_id)).log.follow(after, follow=follow)

    async def cancel(self, build_id: str, *, keep_published: bool = False) -> None:
        """Stop a build and remove everything it left; it cannot publish afterwards.

        An image it has already published is deleted, unless ``keep_published``: then the build
        stays published. Idempotent. An id that was never started is recorded as cancelled, so a
        late start has no effect. Raises InvalidRequest for an invalid id.
        """
        async with self._locks.holding(build_id):
            build = await self._find(build_id)
            if build is None:
                build = await in_thread(self._new, build_id, {"request": None})
                await build.finish("cancelled", "failed", code="build_cancelled", message=CANCELLED)
                return
        await self._stop(build, "cancelled")
        if build.state == "published" and keep_published:
            return
        await in_thread(self._host.store.delete, build_id)
        if build.state == "published":
            await build.override_state(
                "cancelled", {"code": "build_cancelled", "message": CANCELLED}
            )

    def prepare_shutdown(self) -> None:
        """Note that the agent is shutting down: builds whose steps it kills are ``host_lost``."""
        for build in self._running.values():
            build.end_reason = build.end_reason or "host_lost"

    async def close(self) -> None:
        """Stop every build and remove what it left; called when the agent shuts down."""
        running = list(self._running.values())
        await asyncio.gather(*(self._stop(build, "host_lost") for build in running))

    async def recover(self) -> None:
        """Settle interrupted builds and delete old records; called at start."""
        for build in await in_thread(self._interrupted):
            if build.state == "running":
                await self._settle(build)
        await in_thread(self._delete_old_records)
        await in_thread(self._host.layers.recover)

    def _interrupted(self) -> Builds:
        """Return the builds recorded as running; delete directories without a record."""
        found = []
        for directory in sorted(self._directory.iterdir()):
            build = self._read(directory)
            if build is None:
                self._host.store.trash.discard(directory)
            elif build.state == "running":
                found.append(build)
        return found

    async def delete_old_records(self) -> None:
        """Delete the records of builds that finished more than a week ago."""
        await in_thread(self._delete_old_records)

    def users(self) -> set[str]:
        """The ids under which running builds use their base images."""
        return set(self._running)

    # Running ------------------------------------------------------------------------------

    async def _run(self, build: _Build, request: StartBuild, policy: Policy) -> _BuildResult:
        started_at = time.monotonic()
        plan = _plan(request, policy, build.directory)
        published = await Assembly(self._host, plan, build.log.append).run()
        return _BuildResult(published, time.monotonic() - started_at)

    async def _supervise(self, build: _Build, request: StartBuild) -> None:
        """Wait for the build to finish, and record its result whatever happens."""
        assert build.work is not None
        await asyncio.wait([build.work])
        with log_errors(f"the result of build {build.id} could not be recorded"):
            await self._record_end(build, request, build.work)
        self._running.pop(build.id, None)
        self._host.containers.dismiss(build.id)
        await in_thread(self._host.store.clear_revocation, build.id)

    async def _record_end(
        self, build: _Build, request: StartBuild, work: asyncio.Task[_BuildResult]
    ) -> None:
        error = None if work.cancelled() else work.exception()
        is_expected = isinstance(error, HostError | OSError)
        if work.cancelled() or (is_expected and build.end_reason is not None):
            # It was stopped: the error is a consequence of that.
            await _record_stopped(build)
        elif error is None:
            result = work.result()
            await self._record_published(
                build, result.published.image, result.seconds, result.published.publish_ms
            )
        elif isinstance(error, HostError | OSError):
            await _record_failure(build, request, error)
        else:
            _log.error("build %s failed due to a defect", build.id, exc_info=error)
            await build.finish("failed", "failed", code="internal", message=DEFECT)

    async def _record_published(
        self, build: _Build, image: Image, seconds: float, publish_ms: int | None = None
    ) -> None:
        manifest = image.manifest
        await build.finish(
            "published",
            "published",
            image=image.id,
            size_bytes=manifest.size_bytes,
            file_count=manifest.file_count,
            shared_bytes=manifest.shared_bytes,
            total_ms=round(seconds * 1000),
            publish_ms=publish_ms,
        )

    async def terminate_for_space(self, build_id: str) -> None:
        """Stop a build immediately because the machine is out of disk."""
        build = self._running.get(build_id)
        if build is not None:
            await self._stop(build, "no_room")

    async def _stop(self, build: _Build, reason: EndReason) -> None:
        if build.task is None:
            return
        build.end_reason = build.end_reason or reason
        if not build.stopped:
            build.stopped = True
            # First of all, so that from here on it cannot publish.
            if await in_thread(self._host.store.revoke, build.id):
                # Immediately, without TERM: a step that ignores that would delay the response.
                self._host.containers.kill(build.id)
                if build.work is not None:
                    build.work.cancel()
        await asyncio.wait([build.task])

    async def _settle(self, build: _Build) -> None:
        """Clean up a build whose agent died, then record its result."""
        store, host = self._host.store, self._host.containers
        await host.stop(build.id)
        await in_thread(self._remove_leftovers, build)
        terminal = build.log.terminal
        if terminal is not None:
            cancelled = terminal.get("code") == "build_cancelled"
            state: State = "published" if terminal["kind"] == "published" else "failed"
            error = None if state == "published" else _without_envelope(terminal)
            await build.override_state("cancelled" if cancelled else state, error)
        elif await in_thread(store.exists, build.id):
            elapsed = time.time() - float(build.record["created_at"])
            await self._record_published(build, await in_thread(store.get, build.id), elapsed)
        else:
            await build.finish("failed", "failed", code="host_lost", message=HOST_LOST)

    def _remove_leftovers(self, build: _Build) -> None:
        """Remove what a killed agent left of a build, except its record."""
        store = self._host.store
        for entry in build.directory.iterdir():
            if entry.name not in (_RECORD, _EVENTS):
                store.trash.discard(entry)
        store.trash.discard(store.staging_path(build.id))
        request = build.record.get("request") or {}
        store.release(str(request.get("base_image", "")), build.id)

    # Records ------------------------------------------------------------------------------

    def _new(self, build_id: str, fields: Mapping[str, Any]) -> _Build:
        self._host.store.staging_path(build_id)  # Raises InvalidRequest for an invalid id.
        directory = self._directory / build_id
        directory.mkdir(mode=0o700)
        record = {"id": build_id, "state": "running", "created_at": time.time(), **fields}
        build = _Build(build_id, directory, _read_log(directory), record)
        build.save()
        return build

    async def _find(self, build_id: str) -> _Build | None:
        if build_id in self._running:
            return self._running[build_id]
        with contextlib.suppress(InvalidRequest):
            name = self._host.store.staging_path(build_id).name
            return await in_thread(self._read, self._directory / name)
        return None

    def _read(self, directory: Path) -> _Build | None:
        """Read the build in a directory; quarantine it and return None if its record is invalid."""
        try:
            record = read_record(directory / _RECORD, _RECORDS)
            if record is None:
                return None
            if record["id"] != directory.name:
                raise BadRecord(directory / _RECORD, "it is the record of another build")
            return _Build(directory.name, directory, _read_log(directory), dict(record))
        except BadRecord as error:
            self._host.store.quarantine.add_damaged(directory, "build", error.detail)
            return None

    async def _get(self, build_id: str) -> _Build:
        build = await self._find(build_id)
        if build is None:
            raise NotFound(f"There is no build {build_id!r} on this host.")
        return build

    def _delete_old_records(self) -> None:
        for directory in self._directory.iterdir():
            if directory.name in self._running:
                continue
            build = self._read(directory)
            finished = None if build is None else build.record.get("finished_at")
            if finished is not None and finished < time.time() - KEEP_SECONDS:
                shutil.rmtree(directory)


async def _record_failure(build: _Build, request: StartBuild, error: HostError | OSError) -> None:
    if isinstance(error, BuildFailed):
        fields = {
            "code": error.extra["reason"],
            "step": error.extra.get("step"),
            "refused": error.extra.get("refused") or None,
        }
        await build.finish("failed", "failed", message=error.detail, **fields)
    elif isinstance(error, ImageNotFound):
        message = (
            f"The base image {request.base_image} is not on this host: it was deleted, or it "
            "is a built-in base that has not been built yet."
        )
        await build.finish("failed", "failed", code="base_missing", message=message)
    elif isinstance(error, LauncherLost):
        await build.finish("failed", "failed", code="host_lost", message=LAUNCHER_LOST)
    elif isinstance(error, HostError):
        code = "no_room" if isinstance(error, HostFull) else "internal"
        await build.finish("failed", "failed", code=code, message=error.detail)
    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
        await build.finish("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        _log.error("build %s failed due to an I/O error", build.id, exc_info=error)
        message = f"The host could not finish the build: {error.strerror or error}."
        await build.finish("failed", "failed", code="internal", message=message)


async def _record_stopped(build: _Build) -> None:
    if build.end_reason == "cancelled":
        await build.finish("cancelled", "failed", code="build_cancelled", message=CANCELLED)
    elif build.end_reason == "no_room":
        await build.finish("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        await build.finish("failed", "failed", code="host_lost", message=HOST_LOST)


def _plan(request: StartBuild, policy: Policy, directory: Path) -> Plan:
    return Plan(
        image_id=request.id,
        kind="template",
        base=request.base_image,
        recipe=tuple(request.recipe),
        policy=policy,
        limits=Limits.of(request),
        step_timeout=request.step_timeout_seconds,
        build_timeout=request.build_timeout_seconds,
        directory=directory,
        cache=request.cache,
        env=request.env,
    )


def _validate(request: StartBuild) -> Policy:
    """Validate a request; return its network policy.  Raises InvalidRequest."""
    for number, step in enumerate(request.recipe, 1):
        if not step.strip() or "\0" in step or len(step.encode()) > MAX_STEP_BYTES:
            raise InvalidRequest(
                f"recipe: step {number} must be a command of 1 to {MAX_STEP_BYTES} bytes "
                "without NUL."
            )
    check_environment(request.env)
    try:
        return Policy.parse(request.network, request.allow_domains)
    except PolicyError as error:
        raise InvalidRequest(str(error)) from error


def _read_log(directory: Path) -> EventLog:
    """Read a build's events.  Raises BadRecord if they are damaged."""
    path = directory / _EVENTS
    try:
        return EventLog(path)
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise BadRecord(path, "it does not hold a build's events") from error


def _without_envelope(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("seq", "at", "kind")}
