"""Commands that run in the background of a sandbox, whoever watches.

Each has a process on the host that belongs to it (:mod:`hostruntime.container.supervisor`), and
two places on disk::

    sandboxes/<sandbox>/commands/<command>/   in the state directory
      command.json                            what was started, and whether somebody has killed it
      status                                  how it is, written and locked by its supervisor
      refused.json                            what the network policy refused while it ran, if that
                                              can be and it failed: looked up once, when it ended
    commands/<command>                        on the sandbox's own disk: what it has printed

Nothing is kept in memory: agents come and go, and what the files and locks say is the truth.  The
output counts to the sandbox, as everything on its disk does, and goes away with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.container import command_log
from hostruntime.container.cgroups import (
    ContainerGroups,
    cgroup_layout,
    is_populated,
    kill_group,
    move_survivors,
)
from hostruntime.container.exec import kill_tree
from hostruntime.container.launcher import NO_PROCESS_MESSAGE, close_all
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import (
    CwdNotFound,
    Exhausted,
    HostFault,
    InvalidRequest,
    NoSpace,
    NotFound,
    TooManyCommands,
)
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.patience import Patience
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import cancel_and_wait, in_background, in_thread, log_errors
from hostruntime.host.watching import FileWatch
from hostruntime.sandbox.refusals import Refusals, refused_between
from hostruntime.wire.background import CommandFrame, CommandInfo, CommandOutput
from hostruntime.wire.commands import RefusedRequest

MAX_ACTIVE = 16
"""How many may run in a sandbox at once, or have left something behind that can still print."""
MAX_REMEMBERED = 64
"""How many are known of, with their output; the oldest that has ended is forgotten."""
MAX_FOLLOWERS = 256
"""How many may follow the commands of a sandbox at once."""
READS_PER_SECOND = 400
"""For all followers together: what a flood of output is worth, however many watch it.

Each sandbox that is followed has the same share, so that many followers of one slow no other's.
"""
MAX_PART_BYTES = command_log.KEPT_BYTES
_FOLLOWED_BYTES = 64 * 1024
# The rest of a command's text is not kept; it may be very long.
_MAX_TEXT = 16 * 1024
_STOP_SECONDS = 2.0
_POLL_SECONDS = 0.01
_LOCK_SECONDS = 0.5
_DIRECTORY = "commands"
_RECORD, _STATUS, _REFUSED = "command.json", "status", "refused.json"
# The kernel's clock for files is behind by up to a tick.
_TICK_SECONDS = 0.05
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What is known of a command from the start, and whether it was to be killed."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    command: str
    started_at: float
    killed: bool = False


@dataclass(frozen=True)
class Status:
    """What a supervisor writes: the pid inside, and the wait status (wait(2)) at the end."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    pid: int | None = None
    status: int | None = None
    duration_ms: int | None = None
    out_of_memory: bool = False


@dataclass(frozen=True)
class Refused:
    """What was refused while a command ran."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    requests: tuple[RefusedRequest, ...]


_RECORDS = TypeAdapter(Record)
_STATUSES = TypeAdapter(Status)
_REFUSALS = TypeAdapter(Refused)


@dataclass(frozen=True)
class Launch:
    """A command to start: its text, and what it is run as."""

    id: str
    text: str
    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str]


@dataclass
class BackgroundCommands:
    """The background commands of all sandboxes of a host.  For use on one event loop.

    Callers make sure that the sandbox runs, and hold its lock where they start a command.
    """

    paths: StatePaths
    containers: ContainerManager
    # What tells what a sandbox was refused; None if nothing is.
    refusals_of: Callable[[str], Refusals | None] = lambda _: None
    watch: FileWatch = field(default_factory=FileWatch)
    _followers: Counter[str] = field(default_factory=Counter)
    # For each command that has a supervisor, in case that is killed and nobody asks.
    _guards: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)

    async def start(self, sandbox_id: str, launch: Launch) -> CommandInfo:
        """Start a command, unless that id was started before; what it is then.

        Raises TooManyCommands, CwdNotFound, NoSpace, Exhausted, ContainerPaused,
        ContainerGone, HostError; then nothing is left of it.
        """
        if _ID.fullmatch(launch.id) is None:
            raise InvalidRequest(f"{launch.id[:80]!r} is not a command's id: use letters, digits.")
        with contextlib.suppress(NotFound):
            return await in_thread(self.get, sandbox_id, launch.id)
        await in_thread(self._make_room, sandbox_id)
        descriptors: list[int] = []
        try:
            await in_thread(self._create_files, sandbox_id, launch, descriptors)
            await self._launch(sandbox_id, launch, descriptors)
        except BaseException:
            # It may run although its supervisor has died, or cannot say so.
            await in_thread(partial(self._forget, sandbox_id, launch.id, kill=True))
            raise
        finally:
            close_all(descriptors)
        self._guard(sandbox_id, launch.id)
        return await in_thread(self.get, sandbox_id, launch.id)

    def list_all(self, sandbox_id: str) -> list[CommandInfo]:
        """The commands of a sandbox, the newest first; blocks.  Raises OSError."""
        found: list[CommandInfo] = []
        for name in self._ids(sandbox_id):
            with contextlib.suppress(NotFound):
                found.append(self.get(sandbox_id, name))
        return sorted(found, key=lambda info: (info.started_at, info.id), reverse=True)

    def get(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """One command; blocks.  Raises NotFound, OSError."""
        directory = self._directory(sandbox_id, command_id)
        record = _read(directory / _RECORD, _RECORDS)
        if record is None:
            raise NotFound(f"The sandbox has no command {command_id[:80]!r}; it may be forgotten.")
        # In this order: a supervisor writes the status before it lets go of the file.
        active = is_locked(directory / _STATUS)
        status = _read(directory / _STATUS, _STATUSES) or Status()
        if not active:
            _tidy(self._group(sandbox_id, command_id), lost=status.status is None)
        info = _info(record, status, active=active)
        if info.running or info.code == 0 or (refusals := self.refusals_of(sandbox_id)) is None:
            return info
        return replace(info, refused=_refused_meanwhile(directory, sandbox_id, info, refusals))

    async def kill(self, sandbox_id: str, command_id: str) -> CommandInfo:
        """Kill a command with everything it has started; idempotent.

        SIGTERM, and SIGKILL after two seconds, also if the sandbox is paused.  Of one that has
        ended, what it has left behind is killed.  Raises NotFound, OSError.
        """
        info = await in_thread(self.get, sandbox_id, command_id)
        if info.running and not info.killed:
            # The host's disk may be full.
            with log_errors(f"that {command_id} of {sandbox_id} is killed is not recorded"):
                await in_thread(self._mark_killed, sandbox_id, command_id)
        group = self._group(sandbox_id, command_id)
        await _kill_all(group)
        # Its supervisor has nothing to wait for now.
        info, patience = await in_thread(self.get, sandbox_id, command_id), Patience(_STOP_SECONDS)
        while info.active and not patience.exhausted():
            await asyncio.sleep(_POLL_SECONDS)
            # It may have been about to start, and be in its group only now.
            await _kill_all(group)
            info = await in_thread(self.get, sandbox_id, command_id)
        return info

    def output(
        self, sandbox_id: str, command_id: str, offset: int, max_bytes: int
    ) -> CommandOutput:
        """A part of what a command has printed; blocks.  Raises NotFound, OSError."""
        # In this order: what it printed comes before its end.
        info = self.get(sandbox_id, command_id)
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self._log(sandbox_id, command_id), os.O_RDONLY | os.O_CLOEXEC)
            try:
                part = command_log.read(descriptor, offset, min(max_bytes, MAX_PART_BYTES))
            finally:
                os.close(descriptor)
            return CommandOutput(part.data, part.offset, part.size, info)
        raise NotFound(f"The output of the command {command_id} is gone.")

    async def follow(
        self, sandbox_id: str, command_id: str, offset: int, seconds: float
    ) -> AsyncGenerator[CommandFrame, None]:
        """What a command prints from ``offset`` on, until it ends or the time is over.

        Nothing but a watched file is held meanwhile.  Raises NotFound, TooManyCommands (as many
        follow as may), OSError.
        """
        if (following := self._followers[sandbox_id]) >= MAX_FOLLOWERS:
            raise TooManyCommands(
                f"The background commands of this sandbox are followed {following} times at once, "
                "which is all that may be. End one of those streams first.",
                running=following,
            )
        self._followers[sandbox_id] += 1
        try:
            async with aclosing(self._follow(sandbox_id, command_id, offset, seconds)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._followers[sandbox_id] -= 1
            if not self._followers[sandbox_id]:
                del self._followers[sandbox_id]

    async def _follow(
        self, sandbox_id: str, command_id: str, offset: int, seconds: float
    ) -> AsyncGenerator[CommandFrame, None]:
        files = [self._directory(sandbox_id, command_id) / _STATUS]
        files.append(self._log(sandbox_id, command_id))
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        async with self._changes(files) as changed:
            while True:
                changed.clear()
                part = await in_thread(self.output, sandbox_id, command_id, offset, _FOLLOWED_BYTES)
                if part.data or part.offset > offset:
                    yield CommandFrame("output", part.data, part.offset)
                    offset = part.offset + len(part.data)
                    await asyncio.sleep(self._pause(sandbox_id))
                    changed.set()
                elif not part.command.running:
                    yield CommandFrame("ended", offset=offset, command=part.command)
                    return
                if loop.time() >= deadline or not await _within(deadline, changed.wait()):
                    yield CommandFrame("timeout", offset=offset, command=part.command)
                    return

    def _pause(self, sandbox_id: str) -> float:
        """For how many seconds a follower reads nothing, once it has read something."""
        return self._followers[sandbox_id] * len(self._followers) / READS_PER_SECOND

    @asynccontextmanager
    async def _changes(self, files: Sequence[Path]) -> AsyncIterator[asyncio.Event]:
        try:
            async with self.watch.changes(files) as changed:
                yield changed
        except FileNotFoundError as error:
            raise NotFound("The command's output is gone.") from error

    async def recover(self, sandbox_id: str) -> None:
        """Kill what a killed agent and supervisor have left of a sandbox's commands."""
        for command_id in await in_thread(self._active, sandbox_id):
            self._guard(sandbox_id, command_id)

    def _active(self, sandbox_id: str) -> list[str]:
        found = []
        for command_id in self._ids(sandbox_id):
            with log_errors(f"the command {command_id} of {sandbox_id} could not be checked"):
                found += [command_id] if self.get(sandbox_id, command_id).active else []
        return found

    async def close(self) -> None:
        """Stop looking after commands, which run on; nobody may follow any."""
        await cancel_and_wait(*self._guards.values())
        self.watch.close()

    # Supervisors that are killed -----------------------------------------------------------

    def _guard(self, sandbox_id: str, command_id: str) -> None:
        key = (sandbox_id, command_id)
        if key not in self._guards:
            work = self._wait_for_end(sandbox_id, command_id)
            description = f"the command {command_id} of {sandbox_id} could not be looked after"
            self._guards[key] = in_background(work, description)
            self._guards[key].add_done_callback(lambda _: self._guards.pop(key, None))

    async def _wait_for_end(self, sandbox_id: str, command_id: str) -> None:
        """Wait until a command's supervisor has ended; :meth:`get` kills what it has left.

        The kernel tells when it has closed the status file, and a moment later frees the lock.
        """
        status = self._directory(sandbox_id, command_id) / _STATUS
        with contextlib.suppress(NotFound):
            async with self._changes([status]) as changed:
                while True:
                    await changed.wait()
                    changed.clear()
                    for delay in (0.0, _LOCK_SECONDS):
                        await asyncio.sleep(delay)
                        if not (await in_thread(self.get, sandbox_id, command_id)).active:
                            return

    def forget_copied(self, sandbox_id: str) -> None:
        """Delete the output of another sandbox's commands, which a snapshot's disk has; blocks."""
        shutil.rmtree(self._logs(sandbox_id), ignore_errors=True)

    # Pieces --------------------------------------------------------------------------------

    def _make_room(self, sandbox_id: str) -> None:
        commands = self.list_all(sandbox_id)
        active = sum(1 for info in commands if info.active)
        if active >= MAX_ACTIVE:
            raise TooManyCommands(
                f"{active} background commands of this sandbox run, or have left processes behind "
                "that can still print, which is all that may. Stop one of them first.",
                running=active,
            )
        ended = [info for info in commands if not info.active]
        kept = {info.id for info in ended[: max(MAX_REMEMBERED - 1 - active, 0)]}
        kept |= {info.id for info in commands if info.active}
        # Also what a killed agent has not finished.
        logs = {path.name for path in self._logs(sandbox_id).glob("*")}
        for command_id in logs.union(self._ids(sandbox_id)) - kept:
            self._forget(sandbox_id, command_id)

    def _create_files(self, sandbox_id: str, launch: Launch, descriptors: list[int]) -> None:
        """Create a command's files; add the open log and status, the latter locked for good."""
        directory, log = self._directory(sandbox_id, launch.id), self._log(sandbox_id, launch.id)
        for parent in (directory.parent, log.parent):
            parent.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(mode=0o700)
        for path in (log, directory / _STATUS):
            descriptors.append(os.open(path, _NEW_FILE, 0o600))
        _allocate(descriptors[0])
        fcntl.flock(descriptors[1], fcntl.LOCK_EX)
        # Last: it is known from now on.
        record = Record(launch.id, launch.text[:_MAX_TEXT], time.time())
        write_json(directory / _RECORD, asdict(record))

    async def _launch(self, sandbox_id: str, launch: Launch, descriptors: list[int]) -> None:
        """Have the command started; ``descriptors`` that it closes are removed from the list."""
        running = self.containers.get(sandbox_id)
        message = {
            "name": running.name,
            "command": launch.id,
            "argv": list(launch.argv),
            "cwd": launch.cwd,
            "env": {
                **self.containers.environment(running.slot.mode, running.spec.limits.cpu),
                **launch.env,
            },
        }
        answer, answer_in = os.pipe()
        descriptors.append(answer_in)
        try:
            said = await self.containers.launchers.supervise(message, descriptors, answer)
        except TimeoutError as error:
            raise HostFault("The command did not start in time; try again.") from error
        finally:
            os.close(answer)
        reply: dict[str, Any] = json.loads(said) if said else {"error": "its supervisor died"}
        if reply.get("code") == CwdNotFound.code:
            raise CwdNotFound(str(reply["detail"]))
        if "error" in reply:
            self.containers.get(sandbox_id)
            _log.warning("no command could be started in %s: %s", running.name, reply["error"])
            raise Exhausted(NO_PROCESS_MESSAGE)

    def _mark_killed(self, sandbox_id: str, command_id: str) -> None:
        path = self._directory(sandbox_id, command_id) / _RECORD
        record = _read(path, _RECORDS)
        if record is not None:
            write_json(path, asdict(replace(record, killed=True)))

    def _forget(self, sandbox_id: str, command_id: str, *, kill: bool = False) -> None:
        """Remove what there is of a command that has ended, or could not be started."""
        groups = self._groups(sandbox_id)
        group = groups.background_group(command_id)
        directory = self._directory(sandbox_id, command_id)
        starting = is_locked(directory / _STATUS)
        shutil.rmtree(directory, ignore_errors=True)
        self._log(sandbox_id, command_id).unlink(missing_ok=True)
        if kill or starting:
            # After that: its supervisor looks whether the file is there, once it is in the group.
            kill_group(group)
        # What it has left behind, and prints nothing, belongs to the sandbox as a whole now.
        move_survivors(group, groups.unified)

    def _ids(self, sandbox_id: str) -> list[str]:
        # Nothing, if there is no such directory yet.
        return [path.name for path in (self.paths.sandboxes / sandbox_id / _DIRECTORY).glob("*")]

    def _directory(self, sandbox_id: str, command_id: str) -> Path:
        if _ID.fullmatch(command_id) is None:
            raise NotFound(f"{command_id[:80]!r} is not a command's id.")
        return self.paths.sandboxes / sandbox_id / _DIRECTORY / command_id

    def _logs(self, sandbox_id: str) -> Path:
        return self.containers.disks.path(sandbox_id) / _DIRECTORY

    def _log(self, sandbox_id: str, command_id: str) -> Path:
        return self._logs(sandbox_id) / command_id

    def _group(self, sandbox_id: str, command_id: str) -> Path:
        return self._groups(sandbox_id).background_group(command_id)

    def _groups(self, sandbox_id: str) -> ContainerGroups:
        return cgroup_layout().container(self.containers.name_of(sandbox_id))


def _info(record: Record, status: Status, *, active: bool) -> CommandInfo:
    info = CommandInfo(
        record.id,
        record.command,
        status.pid,
        running=active and status.status is None,
        started_at=record.started_at,
        active=active,
        killed=record.killed,
        out_of_memory=status.out_of_memory,
        duration_ms=status.duration_ms,
    )
    if status.status is None:
        return info
    code = os.waitstatus_to_exitcode(status.status)
    return replace(info, code=128 - code, signal=-code) if code < 0 else replace(info, code=code)


def _refused_meanwhile(
    directory: Path, sandbox_id: str, info: CommandInfo, refusals: Refusals
) -> tuple[RefusedRequest, ...]:
    """What was refused while a command ran; from the egress record only the first time."""
    known = _read(directory / _REFUSED, _REFUSALS)
    if known is not None:
        return known.requests
    ended_at = time.time()
    if info.code is not None:
        # Its supervisor wrote to it last when it ended; nobody knows when one ended that was lost.
        with contextlib.suppress(FileNotFoundError):
            ended_at = (directory / _STATUS).stat().st_mtime
    until = ended_at + _TICK_SECONDS
    found = refused_between(refusals, sandbox_id, info.started_at, until)
    if found is None:
        # Whoever asks next may learn it.
        return ()
    # It may be forgotten meanwhile, or the host's disk full.
    with contextlib.suppress(OSError):
        write_json(directory / _REFUSED, asdict(Refused(found)))
    return found


def _read[T](path: Path, kind: TypeAdapter[T]) -> T | None:
    """A record, None if there is none yet."""
    try:
        return read_record(path, kind)
    except BadRecord:
        # Empty, or just being written.
        return None


def is_locked(path: Path) -> bool:
    """Whether a supervisor has the status file open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _tidy(group: Path, *, lost: bool) -> None:
    """Remove the group that a supervisor has left, unless somebody is in there."""
    if lost:
        # Nobody looks after it any more, or sees how it ends.
        kill_group(group)
    # Whoever has closed their end of the pipe may take a moment yet to leave the group.
    with contextlib.suppress(OSError):
        group.rmdir()


async def _kill_all(group: Path) -> None:
    if is_populated(group):
        await kill_tree(group)


def _allocate(descriptor: int) -> None:
    try:
        command_log.allocate(descriptor)
    except OSError as error:
        mebibytes = command_log.RING_BYTES // 2**20
        raise NoSpace(
            f"The sandbox's disk has no {mebibytes} MiB left for the command's output. Delete "
            "something first."
        ) from error


async def _within(deadline: float, work: Awaitable[object]) -> bool:
    """Await something; False if it is not done by then, on the event loop's clock."""
    try:
        async with asyncio.timeout_at(deadline):
            await work
    except TimeoutError:
        return False
    return True
