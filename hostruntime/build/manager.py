"""Builds of templates: started once, watched by anybody, cancelled at any point.

A build is a directory ``builds/<id>/`` with ``build.json`` (the request, the state and, when it
ended, how) and ``events.ndjson``; while it runs also the container's directory.  Its id is that
of the image it will publish.  States: running, then published, failed or cancelled.

A build lives in the agent's process.  One that is found running when the agent starts has lost
its host: it becomes ``failed`` with code ``host_lost``, unless its image was already published.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from pydantic import ConfigDict, TypeAdapter, with_config

from hostruntime.build.assembly import Assembly
from hostruntime.build.log import EventLog
from hostruntime.build.plan import Host, Plan
from hostruntime.container.cgroups import Limits
from hostruntime.container.launcher import LauncherLost
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
from hostruntime.host.threads import in_thread
from hostruntime.image.environment import check_environment
from hostruntime.image.store import Image, check_name
from hostruntime.network.policy import Policy, PolicyError
from hostruntime.wire.builds import BuildInfo, StartBuild

State = Literal["running", "published", "failed", "cancelled"]
Ending = Literal["cancelled", "host_lost", "no_room"]
MAX_STEP_BYTES = 256 * 1024
KEEP_SECONDS = 7 * 86_400.0
CANCELLED = "The build was cancelled."
HOST_LOST = (
    "The host agent stopped while the template was being built, and the build with it. "
    "Nothing is left of it; rebuild the template."
)
NO_ROOM = (
    "The machine ran out of disk while the template was being built, and the build took the most "
    "of it, so it was ended. Nothing is left of it; build the template again when the operator has "
    "made room."
)
LAUNCHER_LOST = (
    "The host's process that starts commands died while the template was being built, and the "
    "build with it. Nothing is left of it; rebuild the template."
)
DEFECT = "The host could not finish the build because of a defect; its log has the details."
_RECORD, _EVENTS = "build.json", "events.ndjson"
_log = logging.getLogger(__name__)


# What else a record has is kept as it is.
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
    task: asyncio.Task[None] | None = None
    ending: Ending | None = None
    stopped: bool = False

    @property
    def state(self) -> State:
        state: State = self.record["state"]
        return state

    def status(self) -> BuildInfo:
        return BuildInfo(self.id, self.state, self.log.last_seq, self.record.get("error"))

    def save(self) -> None:
        write_json(self.directory / _RECORD, self.record)

    def end(self, state: State, kind: str, **fields: Any) -> None:
        """The terminal event, on disk before the state says so."""
        error = {key: value for key, value in fields.items() if value is not None}
        self.record |= {
            "state": state,
            "finished_at": time.time(),
            "error": error if kind == "failed" else None,
        }
        self.log.append(kind, **(error if kind == "failed" else fields))
        self.save()


class BuildManager:
    """The builds of one host.  For one event loop; :meth:`recover` comes first."""

    def __init__(self, paths: StatePaths, host: Host) -> None:
        self._directory = paths.builds
        self._host = host
        self._running: dict[str, _Build] = {}

    # What is asked of it ------------------------------------------------------------------

    def start(self, request: StartBuild) -> tuple[BuildInfo, bool]:
        """Start a build; return its status, and whether it is new (the same id starts once).

        Raises InvalidRequest, and HostFull (nothing is known of it then) while the disk is full.
        """
        known = self._find(request.id)
        if known is not None:
            return known.status(), False
        policy = _checked(request)
        if request.cache is not None:
            check_name(request.cache.scope)
        self._host.containers.require_room()
        build = self._new(request.id, {"request": asdict(request)})
        work = self._run(build, request, policy)
        self._running[build.id] = build
        build.task = asyncio.create_task(work, name=f"build {request.id}")
        build.task.add_done_callback(lambda task: self._on_end(build, task))
        return build.status(), True

    def status(self, build_id: str) -> BuildInfo:
        """A build's state; raises NotFound."""
        return self._get(build_id).status()

    def events(self, build_id: str, after: int = 0, *, follow: bool = True) -> AsyncIterator[bytes]:
        """The events after number ``after`` as NDJSON (see :class:`EventLog`); raises NotFound."""
        return self._get(build_id).log.follow(after, follow=follow)

    async def cancel(self, build_id: str, *, keep_published: bool = False) -> None:
        """Stop a build; nothing of it is left when this returns, and nothing can come after.

        What it published before the cancellation came is deleted, unless ``keep_published``:
        then the build stays published.  Idempotent.  An id that was never started is remembered
        as cancelled, so that a start that comes late starts nothing.  Raises InvalidRequest for
        an id that is none.
        """
        build = self._find(build_id)
        if build is None:
            build = self._new(build_id, {"request": None})
            build.end("cancelled", "failed", code="build_cancelled", message=CANCELLED)
            return
        await self._end(build, "cancelled")
        if build.state == "published" and keep_published:
            return
        await in_thread(self._host.store.delete, build_id)
        if build.state == "published":
            error = {"code": "build_cancelled", "message": CANCELLED}
            build.record |= {"state": "cancelled", "error": error}
            build.save()

    def going(self) -> None:
        """The agent is about to go, and to end every command: that is why a build's step fails."""
        for build in self._running.values():
            build.ending = build.ending or "host_lost"

    async def close(self) -> None:
        """The agent is going: end every build, leaving nothing of them on the host."""
        running = list(self._running.values())
        await asyncio.gather(*(self._end(build, "host_lost") for build in running))

    async def recover(self) -> None:
        """The pass at start: settle the builds that were running, forget those long finished."""
        for directory in sorted(self._directory.iterdir()):
            build = self._read(directory)
            if build is None:
                await in_thread(self._host.store.trash.discard, directory)
            elif build.state == "running":
                await self._settle(build)
        await in_thread(self._forget_old)
        await in_thread(self._host.layers.recover)

    async def forget_old(self) -> None:
        """Delete the records of builds that ended long ago."""
        await in_thread(self._forget_old)

    async def drop_layers(self, scope: str) -> None:
        """Delete the layers of a scope.  Raises InvalidRequest for what is no name."""
        await in_thread(self._host.layers.drop, scope)

    def users(self) -> set[str]:
        """The ids under which running builds use their base images."""
        return set(self._running)

    # A build's life -----------------------------------------------------------------------

    async def _run(self, build: _Build, request: StartBuild, policy: Policy) -> None:
        began = time.monotonic()
        plan = _plan(request, policy, build.directory)
        assembly = Assembly(self._host, plan, build.log.append)
        try:
            image = await assembly.run()
        except (HostError, OSError) as error:
            if build.ending is None:
                _note_failed(build, request, error)
            else:
                # It was ended: whatever gave way first is not why.
                _note_ended(build)
        else:
            seconds = time.monotonic() - began
            self._note_published(build, image, seconds, publish_ms=assembly.publish_ms)

    def _on_end(self, build: _Build, task: asyncio.Task[None]) -> None:
        """Whatever the task came to, the build has an end that says so."""
        self._running.pop(build.id, None)
        self._host.store.reinstate(build.id)
        if build.log.terminal is not None:
            return
        if task.cancelled():
            _note_ended(build)
        else:
            _log.error("build %s failed by a defect", build.id, exc_info=task.exception())
            build.end("failed", "failed", code="internal", message=DEFECT)

    def _note_published(
        self, build: _Build, image: Image, seconds: float, publish_ms: int | None = None
    ) -> None:
        manifest = image.manifest
        build.end(
            "published",
            "published",
            image=image.id,
            size_bytes=manifest.size_bytes,
            file_count=manifest.file_count,
            shared_bytes=manifest.shared_bytes,
            total_ms=round(seconds * 1000),
            publish_ms=publish_ms,
        )

    async def end_for_room(self, build_id: str) -> None:
        """End a build, now, because the machine is out of disk."""
        build = self._running.get(build_id)
        if build is not None:
            await self._end(build, "no_room")

    async def _end(self, build: _Build, ending: Ending) -> None:
        if build.task is None:
            return
        build.ending = build.ending or ending
        if not build.stopped:
            build.stopped = True
            # Before anything else: from here on it cannot publish, whatever it still does.
            if await in_thread(self._host.store.revoke, build.id):
                # At once, not by TERM first: a step that ignores it would hold up the answer.
                self._host.containers.kill(build.id)
                build.task.cancel()
        await asyncio.wait([build.task])

    async def _settle(self, build: _Build) -> None:
        """A build whose agent died: tidy up, then say how it ended."""
        store, host = self._host.store, self._host.containers
        await host.stop(build.id)
        for entry in build.directory.iterdir():
            if entry.name not in (_RECORD, _EVENTS):
                await in_thread(store.trash.discard, entry)
        await in_thread(store.trash.discard, store.staging_path(build.id))
        request = build.record.get("request") or {}
        store.release(str(request.get("base_image", "")), build.id)
        terminal = build.log.terminal
        if terminal is not None:
            cancelled = terminal.get("code") == "build_cancelled"
            state: State = "published" if terminal["kind"] == "published" else "failed"
            error = None if state == "published" else _without_envelope(terminal)
            build.record |= {"state": "cancelled" if cancelled else state, "error": error}
            build.save()
        elif store.exists(build.id):
            elapsed = time.time() - float(build.record["created_at"])
            self._note_published(build, store.get(build.id), elapsed)
        else:
            build.end("failed", "failed", code="host_lost", message=HOST_LOST)

    # Records ------------------------------------------------------------------------------

    def _new(self, build_id: str, fields: Mapping[str, Any]) -> _Build:
        self._host.store.staging_path(build_id)  # Raises InvalidRequest for an id that is none.
        directory = self._directory / build_id
        directory.mkdir(mode=0o700)
        record = {"id": build_id, "state": "running", "created_at": time.time(), **fields}
        build = _Build(build_id, directory, _log_of(directory), record)
        build.save()
        return build

    def _find(self, build_id: str) -> _Build | None:
        if build_id in self._running:
            return self._running[build_id]
        with contextlib.suppress(InvalidRequest):
            name = self._host.store.staging_path(build_id).name
            directory = self._directory / name
            return self._read(directory)
        return None

    def _read(self, directory: Path) -> _Build | None:
        """The build in a directory; one whose record cannot be believed is set aside, and none."""
        try:
            record = read_record(directory / _RECORD, _RECORDS)
            if record is None:
                return None
            if record["id"] != directory.name:
                raise BadRecord(directory / _RECORD, "it is the record of another build")
            return _Build(directory.name, directory, _log_of(directory), dict(record))
        except BadRecord as error:
            self._host.store.quarantine.add_damaged(directory, "build", error.detail)
            return None

    def _get(self, build_id: str) -> _Build:
        build = self._find(build_id)
        if build is None:
            raise NotFound(f"There is no build {build_id!r} on this host.")
        return build

    def _forget_old(self) -> None:
        for directory in self._directory.iterdir():
            build = self._read(directory)
            finished = None if build is None else build.record.get("finished_at")
            if finished is not None and finished < time.time() - KEEP_SECONDS:
                shutil.rmtree(directory)


def _note_failed(build: _Build, request: StartBuild, error: HostError | OSError) -> None:
    if isinstance(error, BuildFailed):
        fields = {
            "code": error.extra["reason"],
            "step": error.extra.get("step"),
            "refused": error.extra.get("refused") or None,
        }
        build.end("failed", "failed", message=error.detail, **fields)
    elif isinstance(error, ImageNotFound):
        message = (
            f"The base image {request.base_image} is not on this host: it was deleted, or it "
            "is a built-in base that has not been made yet."
        )
        build.end("failed", "failed", code="base_missing", message=message)
    elif isinstance(error, LauncherLost):
        build.end("failed", "failed", code="host_lost", message=LAUNCHER_LOST)
    elif isinstance(error, HostError):
        code = "no_room" if isinstance(error, HostFull) else "internal"
        build.end("failed", "failed", code=code, message=error.detail)
    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
        build.end("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        _log.error("build %s failed by a broken machine", build.id, exc_info=error)
        message = f"The host could not finish the build: {error.strerror or error}."
        build.end("failed", "failed", code="internal", message=message)


def _note_ended(build: _Build) -> None:
    """What ended it was asked for, or the agent's own end."""
    if build.ending == "cancelled":
        build.end("cancelled", "failed", code="build_cancelled", message=CANCELLED)
    elif build.ending == "no_room":
        build.end("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        build.end("failed", "failed", code="host_lost", message=HOST_LOST)


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


def _checked(request: StartBuild) -> Policy:
    """The network policy of a request whose fields make sense.  Raises InvalidRequest."""
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


def _log_of(directory: Path) -> EventLog:
    """The events of a build.  Raises BadRecord when they are none."""
    path = directory / _EVENTS
    try:
        return EventLog(path)
    except (ValueError, KeyError, TypeError, IsADirectoryError) as error:
        raise BadRecord(path, "it does not hold a build's events") from error


def _without_envelope(event: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("seq", "at", "kind")}
