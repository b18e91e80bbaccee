"""Running a command in a container: separate pipes, a time limit, the whole tree killed.

Every command gets a control group of its own.  When it runs past its time, or whoever reads its
output goes away, everything in that group gets SIGTERM, then, after two seconds, SIGKILL: what
it forked, however often, dies with it.  What it leaves running when it ends by itself lives on
in the container's group, and what that still writes is read and dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hostruntime.container.cgroups import (
    ContainerGroups,
    adopt_strays,
    kill_group,
    pids_below,
    populated,
    signal_group,
)
from hostruntime.container.inside_exec import SHELL
from hostruntime.container.launcher import Attached, LauncherPool, close_all
from hostruntime.errors import CwdNotFound
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.tasks import log_errors, readable, run_to_completion

GRACE_SECONDS = 2.0
# How long output is waited for after the command itself has ended (`cmd > >(tee log)`).
_LINGER_SECONDS = 0.05
_POLL_SECONDS = 0.02
_READ_BYTES = 64 * 1024
# What commands left in the background goes on to write is read at most so fast, of so many pipes.
_DRAIN_PAUSE_SECONDS = 0.02
_MOST_DRAINED = 128
_draining: dict[str, dict[int, asyncio.TimerHandle | None]] = {}
_BACKLOG_BYTES = 1024 * 1024
_MAX_ARGUMENT_BYTES = 128 * 1024
_PART_CHARACTERS = 30_000  # of at most four bytes each (RFC 3629)
_SHELL_NAME = "bash"
# Those that bash can stand in for.
_SHELLS = frozenset({"bash", "dash", "sh"})
# The file must stay until the script has ended: some interpreters look at it again.
_RUN_SCRIPT = (
    'f=$(mktemp) && printf %s "$@" >"$f" && chmod 700 "$f" || exit; "$f"; s=$?; rm -f "$f"; exit $s'
)
_MAX_PIPE_BYTES = 1024 * 1024  # /proc/sys/fs/pipe-max-size
_log = logging.getLogger(__name__)
_tags = itertools.count(1)

Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True)
class Started:
    """The command runs; ``pid`` is its pid as seen inside the container."""

    pid: int


@dataclass(frozen=True)
class Chunk:
    """Bytes the command wrote."""

    stream: Stream
    data: bytes


@dataclass(frozen=True)
class Exited:
    """The command ended by itself or by a signal; ``code`` is 128 + n for signal n."""

    code: int
    signal: int | None
    duration_ms: int
    out_of_memory: bool = False


@dataclass(frozen=True)
class TimedOut:
    """The command ran past its time and its process tree was killed."""

    duration_ms: int


Frame = Started | Chunk | Exited | TimedOut


def shell(command: str) -> list[str]:
    """The argv that runs ``command`` through bash where the image has it, else /bin/sh.

    A script whose first line names another interpreter, or options, is run by that, from a file
    (execve(2), "Interpreter scripts").

    The kernel takes no single argument of 128 KiB (MAX_ARG_STRLEN, execve(2)).  A longer command
    goes in parts that the shell puts together, and drops, before it runs it.
    """
    if _names_its_interpreter(command):
        return [SHELL, "-c", _RUN_SCRIPT, _SHELL_NAME, *_parts_of(command)]
    if len(command.encode()) < _MAX_ARGUMENT_BYTES:
        return [SHELL, "-c", command]
    parts = _parts_of(command)
    whole = "".join(f"${{{number}}}" for number in range(1, len(parts) + 1))
    # The shift comes with the command in one argument: it is expanded before there is none.
    return [SHELL, "-c", f'eval "shift {len(parts)}; {whole}"', _SHELL_NAME, *parts]


def _parts_of(command: str) -> list[str]:
    begins = range(0, len(command), _PART_CHARACTERS)
    return [command[begin : begin + _PART_CHARACTERS] for begin in begins]


def _names_its_interpreter(command: str) -> bool:
    """Whether a script's first line asks for more than a shell without options."""
    if not command.startswith("#!"):
        return False
    words = command.partition("\n")[0].removeprefix("#!").split()
    if words and words[0].rpartition("/")[2] == "env":
        words = words[1:]
    return len(words) != 1 or words[0].rpartition("/")[2] not in _SHELLS


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; ``timeout`` is in seconds, None for no limit.

    ``stdin`` is the null device unless a descriptor is given, which stays the caller's.
    """

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    timeout: float | None = None
    merge_output: bool = False
    stdin: int | None = None


async def run_command(
    launchers: LauncherPool, groups: ContainerGroups, request: ExecRequest
) -> AsyncGenerator[Frame, None]:
    """Run a command in a container; iterate under ``contextlib.aclosing``: closing kills the tree.

    The last frame is Exited or TimedOut, and then no process of a timed-out command is left.
    Raises CwdNotFound before any frame, HostFault when the container cannot be attached to, and
    LauncherLost, before or after, when what attaches to containers has died, and the command so.
    """
    session = _Session(groups.exec_group(f"{os.getpid()}-{next(_tags)}"), groups)
    try:
        refusal = await session.begin(launchers, request)
        if refusal.get("code") == "cwd_not_found":
            raise CwdNotFound(refusal["detail"])
        yield Started(session.pid_inside)
        async for chunk in session.chunks():
            yield chunk
        if "detail" in refusal:
            yield Chunk("stderr", f"{refusal['detail']}\n".encode())
        yield await session.outcome()
    finally:
        await session.finish()


@dataclass
class _Session:
    """One command from its start to the last process of it."""

    group: Path
    groups: ContainerGroups
    output: _Output = field(default_factory=lambda: _Output())
    attached: Attached | None = None
    started: float = 0.0
    ended: float = 0.0
    oom_before: int = 0
    timer: asyncio.TimerHandle | None = None
    killing: asyncio.Task[None] | None = None

    @property
    def pid_inside(self) -> int:
        return self.attached.pid_inside if self.attached is not None else 0

    async def begin(self, launchers: LauncherPool, request: ExecRequest) -> dict[str, str]:
        """Start the command; return why it could not be entered or run, if so."""
        loop = asyncio.get_running_loop()
        self.oom_before = self.groups.oom_kills()
        status_out, status_in = os.pipe()
        ends = self.output.open(merge=request.merge_output)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            message = _attach_message(self.groups.name, self.group, request)
            fds = [null if request.stdin is None else request.stdin, *ends, status_in]
            self.attached = await launchers.attach(message, fds)
            self.started = loop.time()
            self.attached.ended.add_done_callback(self._on_end)
        except BaseException:
            os.close(status_out)
            raise
        finally:
            close_all([*{null, *ends, status_in}])
        if request.timeout is not None:
            self.timer = loop.call_later(request.timeout, self.kill)
        self.output.start()
        return await _status(status_out)

    def _on_end(self, _: asyncio.Future[int]) -> None:
        self.ended = asyncio.get_running_loop().time()
        self.output.wake()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The output until the command has ended and what it wrote has been read."""
        assert self.attached is not None
        while not (self.attached.ended.done() and self.output.idle()):
            await self.output.something()
            for chunk in self.output.take():
                yield chunk
        if self.killing is None:
            self._stop_timer()
        else:
            await asyncio.shield(self.killing)
        self.output.drain_now()
        if not self.output.closed():
            await self.output.linger(scaled(_LINGER_SECONDS))
        for chunk in self.output.take():
            yield chunk

    async def outcome(self) -> Exited | TimedOut:
        assert self.attached is not None
        # The end can be known here before the callback that notes its time has had its turn.
        ended = self.ended or asyncio.get_running_loop().time()
        duration = round((ended - self.started) * 1000)
        if self.killing is not None:
            return TimedOut(round((asyncio.get_running_loop().time() - self.started) * 1000))
        status = os.waitstatus_to_exitcode(await self.attached.ended)
        code, number = (128 - status, -status) if status < 0 else (status, None)
        oom = code != 0 and self.groups.oom_kills() > self.oom_before
        return Exited(code, number, duration, oom)

    def kill(self) -> None:
        """Begin to kill the whole tree: asked to end, then made to."""
        if self.killing is None:
            self.killing = asyncio.ensure_future(kill_tree(self.group))

    async def finish(self) -> None:
        """Whatever happened, leave nothing behind: no process of an unfinished command, no fd."""
        self._stop_timer()
        if self.attached is not None and not self._ended_properly():
            self.kill()
        try:
            if self.killing is not None:
                with log_errors(f"what runs in {self.group} could not be ended"):
                    await run_to_completion(self.killing)
        finally:
            self.output.leave_to_drain(self.groups.name)
            adopt_strays(self.group, self.groups.unified)

    def _ended_properly(self) -> bool:
        # The other way is that the launcher died, and with it the news of the command's end.
        ended = self.attached.ended if self.attached is not None else None
        return ended is not None and ended.done() and ended.exception() is None

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


async def kill_tree(group: Path) -> None:
    """SIGTERM, up to two seconds of grace, SIGKILL for everything in a group."""
    loop = asyncio.get_running_loop()
    signal_group(group, signal.SIGTERM)
    until = loop.time() + GRACE_SECONDS
    while populated(group) and loop.time() < until:
        await asyncio.sleep(_POLL_SECONDS)
    kill_group(group)
    patience = Patience(GRACE_SECONDS, lambda: pids_below(group))
    while populated(group) and not patience.exhausted():
        await asyncio.sleep(_POLL_SECONDS)
    if populated(group):
        _log.error("processes in %s survive SIGKILL; they wait for the kernel", group)


def _attach_message(name: str, group: Path, request: ExecRequest) -> dict[str, object]:
    return {
        "call": "exec",
        "name": name,
        "group": str(group),
        "argv": list(request.argv),
        "cwd": request.cwd,
        "env": dict(request.env),
    }


async def _status(descriptor: int) -> dict[str, str]:
    """What the attached process says of becoming the command: nothing if it did."""
    data = b""
    os.set_blocking(descriptor, False)
    try:
        while True:
            try:
                part = os.read(descriptor, _READ_BYTES)
            except BlockingIOError:
                await readable(descriptor)
                continue
            if not part:
                break
            data += part
    finally:
        os.close(descriptor)
    return dict(json.loads(data)) if data else {}


class _Output:
    """The read ends of a command's pipes, with back-pressure: a slow reader slows the command."""

    def __init__(self) -> None:
        self._pipes: dict[int, Stream] = {}
        self._paused: set[int] = set()
        self._chunks: deque[Chunk] = deque()
        self._backlog = 0
        self._event = asyncio.Event()

    def open(self, *, merge: bool) -> tuple[int, int]:
        """Make the pipes; return the ends for the command's stdout and stderr."""
        out_read, out_write = os.pipe()
        self._pipes[out_read] = "stdout"
        err_write = out_write
        if not merge:
            err_read, err_write = os.pipe()
            self._pipes[err_read] = "stderr"
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        return out_write, err_write

    def start(self) -> None:
        """Begin to read."""
        loop = asyncio.get_running_loop()
        for descriptor in self._pipes:
            loop.add_reader(descriptor, self._read, descriptor)

    def closed(self) -> bool:
        """Whether every pipe has come to its end."""
        return not self._pipes

    def idle(self) -> bool:
        """Whether nothing that was read waits to be taken."""
        return not self._chunks

    def wake(self) -> None:
        """Let :meth:`something` return."""
        self._event.set()

    async def something(self) -> None:
        """Wait for a chunk, or for :meth:`wake`."""
        if not self._chunks:
            await self._event.wait()
        self._event.clear()

    def take(self) -> list[Chunk]:
        """What was read since the last time; reading goes on if it had been paused."""
        chunks, self._chunks, self._backlog = list(self._chunks), deque(), 0
        for descriptor in self._paused:
            asyncio.get_running_loop().add_reader(descriptor, self._read, descriptor)
        self._paused.clear()
        return chunks

    def drain_now(self) -> None:
        """Read everything that is in the pipes at this moment."""
        for descriptor in list(self._pipes):
            # What is left in the background may write for ever: only what is there counts.
            for _ in range(_MAX_PIPE_BYTES // _READ_BYTES):
                if descriptor not in self._pipes or not self._read(descriptor):
                    break

    async def linger(self, seconds: float) -> None:
        """Give what a finished command left in the background a moment to end its output."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while self._pipes and loop.time() < until:
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._event.wait()

    def leave_to_drain(self, owner: str) -> None:
        """Go on reading pipes that are still open, dropping what comes, until they end."""
        for descriptor in self._pipes:
            asyncio.get_running_loop().remove_reader(descriptor)
            _drain(owner, descriptor)
        self._pipes.clear()
        self._paused.clear()

    def _read(self, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, _READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._chunks.append(Chunk(self._pipes[descriptor], data))
            self._backlog += len(data)
            self._pause_if_full(descriptor)
        else:
            self._close(descriptor)
        self._event.set()
        return bool(data)

    def _pause_if_full(self, descriptor: int) -> None:
        if self._backlog >= _BACKLOG_BYTES and descriptor not in self._paused:
            asyncio.get_running_loop().remove_reader(descriptor)
            self._paused.add(descriptor)

    def _close(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self._paused.discard(descriptor)
        del self._pipes[descriptor]
        os.close(descriptor)


def _drain(owner: str, descriptor: int) -> None:
    """Read a pipe at a bounded pace; of too many the oldest is closed, for its writer to notice.

    Both are the agent's to bear: what writes may be an endless loop, or hold any number of pipes.
    """
    draining = _draining.setdefault(owner, {})
    draining[descriptor] = None
    asyncio.get_running_loop().add_reader(descriptor, _drop, owner, descriptor)
    if len(draining) > _MOST_DRAINED:
        _end_draining(owner, next(iter(draining)))


def _drop(owner: str, descriptor: int) -> None:
    try:
        data = os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return
    if not data:
        _end_draining(owner, descriptor)
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(descriptor)
    _draining[owner][descriptor] = loop.call_later(
        _DRAIN_PAUSE_SECONDS, _drop_on, owner, descriptor
    )


def _drop_on(owner: str, descriptor: int) -> None:
    _draining[owner][descriptor] = None
    asyncio.get_running_loop().add_reader(descriptor, _drop, owner, descriptor)


def _end_draining(owner: str, descriptor: int) -> None:
    waiting = _draining[owner].pop(descriptor)
    if waiting is None:
        asyncio.get_running_loop().remove_reader(descriptor)
    else:
        waiting.cancel()
    os.close(descriptor)
    if not _draining[owner]:
        del _draining[owner]
