"""Running a command in a container: separate pipes, a time limit, the whole tree killed.

Every command gets its own control group.  When it exceeds its time limit, or the reader of its
output disconnects, everything in that group gets SIGTERM and, two seconds later, SIGKILL: all of
its descendants die with it.  Processes that it leaves behind when it exits by itself live on in
the container's group, and whatever they still write is read and discarded.
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
    is_populated,
    kill_group,
    move_survivors,
    pids_under,
    signal_group,
)
from hostruntime.container.inside_exec import SHELL
from hostruntime.container.launcher import Attached, LauncherPool, close_all
from hostruntime.errors import CwdNotFound
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.tasks import log_errors, read_to_end, run_to_completion
from hostruntime.wire.commands import RefusedRequest

GRACE_SECONDS = 2.0
# How long to wait for more output after the command itself has exited (`cmd > >(tee log)`).
_LINGER_SECONDS = 0.05
_POLL_SECONDS = 0.02
# How long a command's pipes may fill before they are watched.
_UNWATCHED_SECONDS = 0.003
_READ_BYTES = 64 * 1024
# Pace, and maximum number of pipes, for discarding what background processes still write.
_DRAIN_PAUSE_SECONDS = 0.02
_MAX_DRAINED_PIPES = 128
_draining: dict[str, dict[int, asyncio.TimerHandle | None]] = {}
_BACKLOG_BYTES = 1024 * 1024
_MAX_ARGUMENT_BYTES = 128 * 1024
_PART_CHARACTERS = 30_000  # of at most four bytes each (RFC 3629)
_SHELL_NAME = "bash"
# Shells that bash can substitute for.
_SHELLS = frozenset({"bash", "dash", "sh"})
# The file must exist until the script has finished: some interpreters read it again.
_RUN_SCRIPT = (
    'f=$(mktemp) && printf %s "$@" >"$f" && chmod 700 "$f" || exit; "$f"; s=$?; rm -f "$f"; exit $s'
)
_MAX_PIPE_BYTES = 1024 * 1024  # /proc/sys/fs/pipe-max-size
_log = logging.getLogger(__name__)
_tags = itertools.count(1)

Stream = Literal["stdout", "stderr"]


@dataclass(frozen=True)
class Started:
    """The command is running; ``pid`` is its pid inside the container."""

    pid: int


@dataclass(frozen=True)
class Chunk:
    """Bytes the command wrote."""

    stream: Stream
    data: bytes


@dataclass(frozen=True)
class Exited:
    """The command exited or was killed by a signal; ``code`` is 128 + n for signal n.

    ``refused`` is filled in by who knows the sandbox's network policy.
    """

    code: int
    signal: int | None
    duration_ms: int
    out_of_memory: bool = False
    refused: tuple[RefusedRequest, ...] = ()


@dataclass(frozen=True)
class TimedOut:
    """The command exceeded its time limit and its process tree was killed."""

    duration_ms: int
    refused: tuple[RefusedRequest, ...] = ()


Frame = Started | Chunk | Exited | TimedOut


def shell_argv(command: str) -> list[str]:
    """The argv that runs ``command`` through bash if the image has it, else /bin/sh.

    A script whose first line names another interpreter, or options, is run by that interpreter,
    from a file (execve(2), "Interpreter scripts").

    The kernel rejects a single argument of 128 KiB (MAX_ARG_STRLEN, execve(2)).  A longer command
    is passed in parts, which the shell joins, and removes from its arguments, before it runs it.
    """
    if _has_other_interpreter(command):
        return [SHELL, "-c", _RUN_SCRIPT, _SHELL_NAME, *_split_command(command)]
    if len(command.encode()) < _MAX_ARGUMENT_BYTES:
        return [SHELL, "-c", command]
    parts = _split_command(command)
    joined = "".join(f"${{{number}}}" for number in range(1, len(parts) + 1))
    # eval gets the shift and the command together, so the parts are expanded before the shift.
    return [SHELL, "-c", f'eval "shift {len(parts)}; {joined}"', _SHELL_NAME, *parts]


def _split_command(command: str) -> list[str]:
    starts = range(0, len(command), _PART_CHARACTERS)
    return [command[start : start + _PART_CHARACTERS] for start in starts]


def _has_other_interpreter(command: str) -> bool:
    """Whether a script's first line requests anything but a shell without options."""
    if not command.startswith("#!"):
        return False
    parts = command.partition("\n")[0].removeprefix("#!").split()
    if parts and parts[0].rpartition("/")[2] == "env":
        parts = parts[1:]
    return len(parts) != 1 or parts[0].rpartition("/")[2] not in _SHELLS


@dataclass(frozen=True)
class ExecRequest:
    """A command to run; ``timeout`` is in seconds, None for no limit.

    ``stdin`` is the null device unless a descriptor is provided, which the caller must close.
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

    The last frame is Exited or TimedOut; no process of a timed-out command is left by then.
    Raises CwdNotFound before any frame, HostFault if attaching to the container fails, and
    LauncherLost, before or after, if the launcher has died, and the command with it.
    """
    session = _Session(groups.exec_group(f"{os.getpid()}-{next(_tags)}"), groups)
    try:
        failure = await session.start(launchers, request)
        if failure.get("code") == "cwd_not_found":
            raise CwdNotFound(failure["detail"])
        yield Started(session.pid_inside)
        async for chunk in session.chunks():
            yield chunk
        if "detail" in failure:
            yield Chunk("stderr", f"{failure['detail']}\n".encode())
        yield await session.outcome()
    finally:
        await session.finish()


@dataclass
class _Session:
    """One command, from its start until its last process has exited."""

    group: Path
    groups: ContainerGroups
    output: _Output = field(default_factory=lambda: _Output())
    attached: Attached | None = None
    started_at: float = 0.0
    exited_at: float = 0.0
    oom_before: int = 0
    timer: asyncio.TimerHandle | None = None
    killing: asyncio.Task[None] | None = None

    @property
    def pid_inside(self) -> int:
        return self.attached.pid_inside if self.attached is not None else 0

    async def start(self, launchers: LauncherPool, request: ExecRequest) -> dict[str, str]:
        """Start the command; return why it could not be run, or an empty dictionary."""
        loop = asyncio.get_running_loop()
        self.oom_before = self.groups.oom_kills()
        status_out, status_in = os.pipe()
        write_ends = self.output.open(merge=request.merge_output)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            message = _attach_message(self.groups.name, self.group, request)
            fds = [null if request.stdin is None else request.stdin, *write_ends, status_in]
            self.attached = await launchers.attach(message, fds)
            self.started_at = loop.time()
            self.attached.exit_status.add_done_callback(self._on_exit)
        except BaseException:
            os.close(status_out)
            raise
        finally:
            close_all([*{null, *write_ends, status_in}])
        if request.timeout is not None:
            self.timer = loop.call_later(request.timeout, self.kill)
        self.output.start_soon()
        return await _read_failure(status_out)

    def _on_exit(self, _: asyncio.Future[int]) -> None:
        self.exited_at = asyncio.get_running_loop().time()
        self.output.wake()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The output, until the command has exited and all it wrote has been read."""
        assert self.attached is not None
        while not (self.attached.exit_status.done() and self.output.is_empty()):
            await self.output.wait()
            for chunk in self.output.pop_chunks():
                yield chunk
        if self.killing is None:
            self._stop_timer()
        else:
            await asyncio.shield(self.killing)
        self.output.read_available()
        if not self.output.is_closed():
            self.output.start()
            await self.output.linger(scaled(_LINGER_SECONDS))
        for chunk in self.output.pop_chunks():
            yield chunk

    async def outcome(self) -> Exited | TimedOut:
        assert self.attached is not None
        # The exit can be known here before the callback that records its time has run.
        exited_at = self.exited_at or asyncio.get_running_loop().time()
        duration = round((exited_at - self.started_at) * 1000)
        if self.killing is not None:
            return TimedOut(round((asyncio.get_running_loop().time() - self.started_at) * 1000))
        status = os.waitstatus_to_exitcode(await self.attached.exit_status)
        code, signal_number = (128 - status, -status) if status < 0 else (status, None)
        oom = code != 0 and self.groups.oom_kills() > self.oom_before
        return Exited(code, signal_number, duration, oom)

    def kill(self) -> None:
        """Start killing the whole tree: SIGTERM, then SIGKILL."""
        if self.killing is None:
            self.killing = asyncio.ensure_future(kill_tree(self.group))

    async def finish(self) -> None:
        """Clean up in any case: leave no process of an unfinished command and no descriptor."""
        self._stop_timer()
        if self.attached is not None and not self._exit_is_known():
            self.kill()
        try:
            if self.killing is not None:
                with log_errors(f"the processes in {self.group} could not be killed"):
                    await run_to_completion(self.killing)
        finally:
            self.output.drain_in_background(self.groups.name)
            move_survivors(self.group, self.groups.unified)

    def _exit_is_known(self) -> bool:
        # If the launcher died, the command's exit can no longer be observed.
        exit_status = self.attached.exit_status if self.attached is not None else None
        return exit_status is not None and exit_status.done() and exit_status.exception() is None

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


async def kill_tree(group: Path) -> None:
    """Send SIGTERM to everything in a group, wait up to two seconds, and send SIGKILL."""
    loop = asyncio.get_running_loop()
    signal_group(group, signal.SIGTERM)
    deadline = loop.time() + GRACE_SECONDS
    while is_populated(group) and loop.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    kill_group(group)
    patience = Patience(GRACE_SECONDS, lambda: pids_under(group))
    while is_populated(group) and not patience.exhausted():
        await asyncio.sleep(_POLL_SECONDS)
    if is_populated(group):
        _log.error("processes in %s survive SIGKILL; they are blocked in the kernel", group)


def _attach_message(name: str, group: Path, request: ExecRequest) -> dict[str, object]:
    return {
        "call": "exec",
        "name": name,
        "group": str(group),
        "argv": list(request.argv),
        "cwd": request.cwd,
        "env": dict(request.env),
    }


async def _read_failure(descriptor: int) -> dict[str, str]:
    """Read why the attached process could not become the command; empty if it did."""
    try:
        data = await read_to_end(descriptor)
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
        self._starting: asyncio.TimerHandle | None = None

    def open(self, *, merge: bool) -> tuple[int, int]:
        """Create the pipes; return the write ends for the command's stdout and stderr."""
        out_read, out_write = os.pipe()
        self._pipes[out_read] = "stdout"
        err_write = out_write
        if not merge:
            err_read, err_write = os.pipe()
            self._pipes[err_read] = "stderr"
        for descriptor in self._pipes:
            os.set_blocking(descriptor, False)
        return out_write, err_write

    def start_soon(self) -> None:
        """Start reading in a moment: most commands have ended by then.

        What those wrote is in the pipes, and :meth:`read_available` gets it, without the event loop
        having to watch them.
        """
        self._starting = asyncio.get_running_loop().call_later(_UNWATCHED_SECONDS, self.start)

    def start(self) -> None:
        """Start reading now, unless it has been started."""
        if self._starting is None:
            return
        self._stop_starting()
        loop = asyncio.get_running_loop()
        for descriptor in self._pipes:
            loop.add_reader(descriptor, self._read, descriptor)

    def _stop_starting(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None

    def is_closed(self) -> bool:
        """Whether every pipe is at its end."""
        return not self._pipes

    def is_empty(self) -> bool:
        """Whether no chunk is waiting for :meth:`pop_chunks`."""
        return not self._chunks

    def wake(self) -> None:
        """Make :meth:`wait` return."""
        self._event.set()

    async def wait(self) -> None:
        """Wait for a chunk, or for :meth:`wake`."""
        if not self._chunks:
            await self._event.wait()
        self._event.clear()

    def pop_chunks(self) -> list[Chunk]:
        """The chunks read since the last call; resumes reading if it was paused."""
        chunks, self._chunks, self._backlog = list(self._chunks), deque(), 0
        for descriptor in self._paused:
            asyncio.get_running_loop().add_reader(descriptor, self._read, descriptor)
        self._paused.clear()
        return chunks

    def read_available(self) -> None:
        """Read everything that is in the pipes now."""
        for descriptor in list(self._pipes):
            # Background processes may write forever: read only what is there already.
            for _ in range(_MAX_PIPE_BYTES // _READ_BYTES):
                if descriptor not in self._pipes or not self._read(descriptor):
                    break

    async def linger(self, seconds: float) -> None:
        """Give the background processes of a finished command a moment to finish their output."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self._pipes and loop.time() < deadline:
            self._event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._event.wait()

    def drain_in_background(self, owner: str) -> None:
        """Keep reading pipes that are still open, and discard the data, until they end."""
        self._stop_starting()
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
    """Discard a pipe's data at a bounded pace; if there are too many pipes, close the oldest.

    Both protect the agent: the writer may be an endless loop, or hold any number of pipes.
    """
    draining = _draining.setdefault(owner, {})
    draining[descriptor] = None
    asyncio.get_running_loop().add_reader(descriptor, _discard, owner, descriptor)
    if len(draining) > _MAX_DRAINED_PIPES:
        _stop_draining(owner, next(iter(draining)))


def _discard(owner: str, descriptor: int) -> None:
    try:
        data = os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return
    if not data:
        _stop_draining(owner, descriptor)
        return
    loop = asyncio.get_running_loop()
    loop.remove_reader(descriptor)
    _draining[owner][descriptor] = loop.call_later(
        _DRAIN_PAUSE_SECONDS, _resume_discarding, owner, descriptor
    )


def _resume_discarding(owner: str, descriptor: int) -> None:
    _draining[owner][descriptor] = None
    asyncio.get_running_loop().add_reader(descriptor, _discard, owner, descriptor)


def _stop_draining(owner: str, descriptor: int) -> None:
    timer = _draining[owner].pop(descriptor)
    if timer is None:
        asyncio.get_running_loop().remove_reader(descriptor)
    else:
        timer.cancel()
    os.close(descriptor)
    if not _draining[owner]:
        del _draining[owner]
