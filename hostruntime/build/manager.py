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
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from pydantic import ConfigDict, TypeAdapter, with_config

from hostruntime.build.assembly import Assembly, Published
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
from hostruntime.host.tasks import KeyedLocks, in_thread, log_errors, shielded
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
    # What makes the image, and who waits for that and says how it ended.
    work: asyncio.Task[_Made] | None = None
    task: asyncio.Task[None] | None = None
    ending: Ending | None = None
    stopped: bool = False
    _final: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State:
        state: State = self._now["state"]
        return state

    @property
    def _now(self) -> dict[str, Any]:
        """The record; with its end from the moment that followers hear of it."""
        return self.record | (self._final if self.log.terminal is not None else {})

    def status(self) -> BuildInfo:
        return BuildInfo(self.id, self.state, self.log.last_seq, self._now.get("error"))

    def save(self) -> None:
        """Write the record.  Blocks; raises OSError."""
        write_json(self.directory / _RECORD, self._now)

    async def become(self, state: State, error: Mapping[str, Any] | None) -> None:
        """Be in another state than the log says, on disk."""
        self.record = self._now | {"state": state, "error": error}
        self._final = {}
        await in_thread(self.save)

    async def end(self, state: State, kind: str, **fields: Any) -> None:
        """The terminal event, on disk before the state says so.  Raises OSError."""
        error = {key: value for key, value in fields.items() if value is not None}
        self._final = {
            "state": state,
            "finished_at": time.time(),
            "error": error if kind == "failed" else None,
        }
        save = partial(write_json, self.directory / _RECORD, self.record | self._final)
        await self.log.finish(kind, save, **(error if kind == "failed" else fields))


@dataclass(frozen=True)
class _Made:
    """What a build that went well has made, and in how many seconds."""

    published: Published
    seconds: float


Builds = list[_Build]


class BuildManager:
    """The builds of one host.  For one event loop; :meth:`recover` comes first."""

    def __init__(self, paths: StatePaths, host: Host) -> None:
        self._directory = paths.builds
        self._host = host
        self._running: dict[str, _Build] = {}
        # An id is started once, or cancelled before it is.
        self._turns = KeyedLocks()

    # What is asked of it ------------------------------------------------------------------

    async def start(self, request: StartBuild) -> tuple[BuildInfo, bool]:
        """Start a build; return its status, and whether it is new (the same id starts once).

        Raises InvalidRequest, and HostFull (nothing is known of it then) while the disk is full.
        """
        return await shielded(self._start(request))

    async def _start(self, request: StartBuild) -> tuple[BuildInfo, bool]:
        async with self._turns.holding(request.id):
            known = await self._find(request.id)
            if known is not None:
                return known.status(), False
            policy = _checked(request)
            if request.cache is not None:
                check_name(request.cache.scope)
            await in_thread(self._host.containers.require_space)
            build = await in_thread(self._new, request.id, {"request": asdict(request)})
            self._running[build.id] = build
            work = self._run(build, request, policy)
            build.work = asyncio.create_task(work, name=f"build {request.id}")
            build.task = asyncio.create_task(self._live(build, request))
            return build.status(), True

    async def status(self, build_id: str) -> BuildInfo:
        """A build's state; raises NotFound."""
        return (await self._get(build_id)).status()

    async def events(
        self, build_id: str, after: int = 0, *, follow: bool = True
    ) -> AsyncIterator[bytes]:
        """The events after number ``after`` as NDJSON (see :class:`EventLog`); raises NotFound."""
        return (await self._get(build_id)).log.follow(after, follow=follow)

    async def cancel(self, build_id: str, *, keep_published: bool = False) -> None:
        """Stop a build; nothing of it is left when this returns, and nothing can come after.

        What it published before the cancellation came is deleted, unless ``keep_published``:
        then the build stays published.  Idempotent.  An id that was never started is remembered
        as cancelled, so that a start that comes late starts nothing.  Raises InvalidRequest for
        an id that is none.
        """
        async with self._turns.holding(build_id):
            build = await self._find(build_id)
            if build is None:
                build = await in_thread(self._new, build_id, {"request": None})
                await build.end("cancelled", "failed", code="build_cancelled", message=CANCELLED)
                return
        await self._end(build, "cancelled")
        if build.state == "published" and keep_published:
            return
        await in_thread(self._host.store.delete, build_id)
        if build.state == "published":
            await build.become("cancelled", {"code": "build_cancelled", "message": CANCELLED})

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
        for build in await in_thread(self._recorded):
            if build.state == "running":
                await self._settle(build)
        await in_thread(self._forget_old)
        await in_thread(self._host.layers.recover)

    def _recorded(self) -> Builds:
        """The builds of which there is a record; what else is there goes."""
        found = []
        for directory in sorted(self._directory.iterdir()):
            build = self._read(directory)
            if build is None:
                self._host.store.trash.discard(directory)
            elif build.state == "running":
                found.append(build)
        return found

    async def forget_old(self) -> None:
        """Delete the records of builds that ended long ago."""
        await in_thread(self._forget_old)

    def users(self) -> set[str]:
        """The ids under which running builds use their base images."""
        return set(self._running)

    # A build's life -----------------------------------------------------------------------

    async def _run(self, build: _Build, request: StartBuild, policy: Policy) -> _Made:
        began = time.monotonic()
        plan = _plan(request, policy, build.directory)
        published = await Assembly(self._host, plan, build.log.append).run()
        return _Made(published, time.monotonic() - began)

    async def _live(self, build: _Build, request: StartBuild) -> None:
        """Wait for the work; whatever it came to, the build has an end that says so."""
        assert build.work is not None
        await asyncio.wait([build.work])
        with log_errors(f"how build {build.id} ended could not be written down"):
            await self._note_end(build, request, build.work)
        self._running.pop(build.id, None)
        await in_thread(self._host.store.reinstate, build.id)

    async def _note_end(
        self, build: _Build, request: StartBuild, work: asyncio.Task[_Made]
    ) -> None:
        error = None if work.cancelled() else work.exception()
        foreseen = isinstance(error, HostError | OSError)
        if work.cancelled() or (foreseen and build.ending is not None):
            # It was ended: whatever gave way first is not why.
            await _note_ended(build)
        elif error is None:
            made = work.result()
            await self._note_published(
                build, made.published.image, made.seconds, made.published.publish_ms
            )
        elif isinstance(error, HostError | OSError):
            await _note_failed(build, request, error)
        else:
            _log.error("build %s failed by a defect", build.id, exc_info=error)
            await build.end("failed", "failed", code="internal", message=DEFECT)

    async def _note_published(
        self, build: _Build, image: Image, seconds: float, publish_ms: int | None = None
    ) -> None:
        manifest = image.manifest
        await build.end(
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
                if build.work is not None:
                    build.work.cancel()
        await asyncio.wait([build.task])

    async def _settle(self, build: _Build) -> None:
        """A build whose agent died: tidy up, then say how it ended."""
        store, host = self._host.store, self._host.containers
        await host.stop(build.id)
        await in_thread(self._clear_away, build)
        terminal = build.log.terminal
        if terminal is not None:
            cancelled = terminal.get("code") == "build_cancelled"
            state: State = "published" if terminal["kind"] == "published" else "failed"
            error = None if state == "published" else _without_envelope(terminal)
            await build.become("cancelled" if cancelled else state, error)
        elif await in_thread(store.exists, build.id):
            elapsed = time.time() - float(build.record["created_at"])
            await self._note_published(build, await in_thread(store.get, build.id), elapsed)
        else:
            await build.end("failed", "failed", code="host_lost", message=HOST_LOST)

    def _clear_away(self, build: _Build) -> None:
        """What a killed agent left of a build, but for its record."""
        store = self._host.store
        for entry in build.directory.iterdir():
            if entry.name not in (_RECORD, _EVENTS):
                store.trash.discard(entry)
        store.trash.discard(store.staging_path(build.id))
        request = build.record.get("request") or {}
        store.release(str(request.get("base_image", "")), build.id)

    # Records ------------------------------------------------------------------------------

    def _new(self, build_id: str, fields: Mapping[str, Any]) -> _Build:
        self._host.store.staging_path(build_id)  # Raises InvalidRequest for an id that is none.
        directory = self._directory / build_id
        directory.mkdir(mode=0o700)
        record = {"id": build_id, "state": "running", "created_at": time.time(), **fields}
        build = _Build(build_id, directory, _log_of(directory), record)
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

    async def _get(self, build_id: str) -> _Build:
        build = await self._find(build_id)
        if build is None:
            raise NotFound(f"There is no build {build_id!r} on this host.")
        return build

    def _forget_old(self) -> None:
        for directory in self._directory.iterdir():
            if directory.name in self._running:
                continue
            build = self._read(directory)
            finished = None if build is None else build.record.get("finished_at")
            if finished is not None and finished < time.time() - KEEP_SECONDS:
                shutil.rmtree(directory)


async def _note_failed(build: _Build, request: StartBuild, error: HostError | OSError) -> None:
    if isinstance(error, BuildFailed):
        fields = {
            "code": error.extra["reason"],
            "step": error.extra.get("step"),
            "refused": error.extra.get("refused") or None,
        }
        await build.end("failed", "failed", message=error.detail, **fields)
    elif isinstance(error, ImageNotFound):
        message = (
            f"The base image {request.base_image} is not on this host: it was deleted, or it "
            "is a built-in base that has not been made yet."
        )
        await build.end("failed", "failed", code="base_missing", message=message)
    elif isinstance(error, LauncherLost):
        await build.end("failed", "failed", code="host_lost", message=LAUNCHER_LOST)
    elif isinstance(error, HostError):
        code = "no_room" if isinstance(error, HostFull) else "internal"
        await build.end("failed", "failed", code=code, message=error.detail)
    elif error.errno in {errno.ENOSPC, errno.EDQUOT}:
        await build.end("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        _log.error("build %s failed by a broken machine", build.id, exc_info=error)
        message = f"The host could not finish the build: {error.strerror or error}."
        await build.end("failed", "failed", code="internal", message=message)


async def _note_ended(build: _Build) -> None:
    """What ended it was asked for, or the agent's own end."""
    if build.ending == "cancelled":
        await build.end("cancelled", "failed", code="build_cancelled", message=CANCELLED)
    elif build.ending == "no_room":
        await build.end("failed", "failed", code="no_room", message=NO_ROOM)
    else:
        await build.end("failed", "failed", code="host_lost", message=HOST_LOST)


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
