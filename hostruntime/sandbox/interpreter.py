"""The code interpreter: contexts, each with a Jupyter kernel of the image's inside the sandbox.

A context is a command that runs in the background, like those of
:mod:`hostruntime.sandbox.background`: a *bridge* (:mod:`hostruntime.container.inside_bridge`),
which has a kernel.  It is in a control group of its own within the sandbox's, so it freezes, is
accounted and ends with the sandbox, and one context ends without the others noticing.  Its
supervisor and it outlive the agent.  On disk, in the state directory::

    sandboxes/<sandbox>/contexts/<context>/
      context.json      what it is, once its kernel runs
      status            how its bridge is, written and locked by its supervisor
      socket            what the bridge listens on, created here: nobody inside can reach its name
      use.json          how often it was used, and when last

What ends with its kernel, or does not keep to the protocol, is killed, and replaced when it is
used the next time, which that run's ``restarted`` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.container.cgroups import cgroup_layout, is_populated, kill_group
from hostruntime.container.launcher import NO_PROCESS_MESSAGE, close_all
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import (
    ContainerGone,
    ContextBusy,
    ContextNotFound,
    CwdNotFound,
    Exhausted,
    InterpreterUnavailable,
    InvalidRequest,
    KernelFailed,
    TooManyContexts,
)
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import KeyedLocks, in_thread, log_errors
from hostruntime.sandbox.background import Status, is_locked
from hostruntime.sandbox.bridges import BOOTSTRAP, Bridge, BridgeGone, Started, listen
from hostruntime.wire.interpreter import CodeError, CodeFrame, ContextInfo, CreateContext, RunCode

MAX_CONTEXTS = 8
"""How many a sandbox may have."""
MAX_WAITING = 16
"""How many runs may wait for one context, or be in it."""
DEFAULT_CONTEXT = "default"
_PYTHON = "python"
_START_SECONDS = 90.0
# After its time, a run is interrupted, and killed if that does not help; the bridge does both.
_OVERTIME_SECONDS = 15.0
_END_SECONDS = 3.0
_POLL_SECONDS = 0.01
_DIRECTORY, _RECORD, _STATUS, _USE = "contexts", "context.json", "status", "use.json"
_NEW_FILE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_NOT_FOUND_STATUS = 127
_PAUSED = "The sandbox was paused while the code ran; it is interrupted when that is resumed."


@dataclass(frozen=True)
class Record:
    """What a context is."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    language: str
    cwd: str
    created_at: float


@dataclass(frozen=True)
class Use:
    """How a context was used since its kernel was started."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    executions: int = 0
    last_used_at: float | None = None


_RECORDS, _USES, _STATUSES = TypeAdapter(Record), TypeAdapter(Use), TypeAdapter(Status)


@dataclass(frozen=True)
class Access:
    """A sandbox whose contexts are used.

    ``usable`` is held while a process is started in it, and gives its environment; it raises
    ContainerGone and ContainerPaused.  ``is_paused`` says whether its time stands still.
    """

    id: str
    usable: Callable[[], AbstractAsyncContextManager[Mapping[str, str]]]
    is_paused: Callable[[], bool]


@dataclass
class Interpreter:
    """The contexts of all sandboxes of a host.  For use on one event loop."""

    paths: StatePaths
    containers: ContainerManager
    # For each context: its start and end, and whose turn it is.
    _changes: KeyedLocks = field(default_factory=KeyedLocks)
    _turns: KeyedLocks = field(default_factory=KeyedLocks)
    _waiting: Counter[str] = field(default_factory=Counter)

    async def create(self, access: Access, request: CreateContext) -> ContextInfo:
        """Start a context, unless that id was started before.

        Raises InterpreterUnavailable, KernelFailed, TooManyContexts, CwdNotFound, Exhausted,
        InvalidRequest, ContainerGone, ContainerPaused.
        """
        directory = self._directory(access.id, request.id)
        async with self._changing(access.id, request.id):
            if await in_thread(_record, directory) is None:
                record = Record(request.id, request.language, request.cwd, time.time())
                await self._start(access, record, known=False)
            return await in_thread(self._info, access.id, request.id)

    def list_all(self, sandbox_id: str) -> list[ContextInfo]:
        """The contexts of a sandbox, the newest first; blocks.  Raises OSError."""
        found: list[ContextInfo] = []
        for context_id in self._ids(sandbox_id):
            with contextlib.suppress(ContextNotFound):
                found.append(self._info(sandbox_id, context_id))
        return sorted(found, key=lambda info: (info.created_at, info.id), reverse=True)

    async def restart(self, access: Access, context_id: str) -> ContextInfo:
        """Replace a context's kernel by a new one; what runs in it ends.

        Raises ContextNotFound, and like :meth:`create`.
        """
        async with self._changing(access.id, context_id):
            record = await in_thread(self._require, access.id, context_id)
            await self._start(access, record, known=True)
            return await in_thread(self._info, access.id, context_id)

    async def remove(self, sandbox_id: str, context_id: str) -> None:
        """End a context, with all that it has started.  Raises ContextNotFound."""
        async with self._changing(sandbox_id, context_id):
            await in_thread(self._require, sandbox_id, context_id)
            await self._forget(sandbox_id, context_id)

    async def run(self, access: Access, request: RunCode) -> AsyncGenerator[CodeFrame, None]:
        """Run code, when it is the context's turn; iterate under ``contextlib.aclosing``.

        The first frame is ``started``, the last ``done``.  Closing it early interrupts the code.
        Raises, before any frame, ContextNotFound, ContextBusy, and like :meth:`create`.
        """
        wanted = _wanted_context(request)
        async with AsyncExitStack() as stack:
            await self._take_turn(stack, access.id, wanted.id, request.timeout_seconds)
            record, bridge, restarted = await self._open(stack, access, request, wanted)
            yield CodeFrame("started", context_id=record.id, restarted=restarted)
            frames = bridge.run(request.code, request.timeout_seconds)
            deadline = request.timeout_seconds + scaled(_OVERTIME_SECONDS)
            last: CodeFrame | None = None
            async with aclosing(self._believable(frames, deadline)) as believable:
                async for frame in believable:
                    if frame.kind == "done":
                        last = replace(frame, context_id=record.id, restarted=restarted)
                    else:
                        yield frame
            assert last is not None
            if last.lost and access.is_paused():
                # It is interrupted when it goes on, as nobody waits for it any more.
                last = replace(last, lost="")
                yield CodeFrame("error", error=CodeError("SandboxPaused", _PAUSED))
            elif last.lost:
                await self._lose(access.id, record.id)
                yield CodeFrame("error", error=CodeError("ContextLost", last.lost))
            else:
                await in_thread(self._count_use, access.id, record.id)
            yield last

    def recover(self, sandbox_id: str) -> None:
        """Kill what a killed agent was about to start; blocks."""
        for context_id in self._ids(sandbox_id):
            directory = self._directory(sandbox_id, context_id)
            if _record(directory) is None:
                shutil.rmtree(directory, ignore_errors=True)
                kill_group(self._group(sandbox_id, context_id))

    # Running -------------------------------------------------------------------------------

    async def _take_turn(
        self, stack: AsyncExitStack, sandbox_id: str, context_id: str, seconds: float
    ) -> None:
        key = f"{sandbox_id}/{context_id}"
        busy = ContextBusy(
            "The context runs other code, and goes on to; wait for that, or use another context."
        )
        if self._waiting[key] >= MAX_WAITING:
            raise busy
        self._waiting[key] += 1
        stack.callback(self._leave, key)
        try:
            async with asyncio.timeout(seconds):
                await stack.enter_async_context(self._turns.holding(key))
        except TimeoutError:
            raise busy from None

    def _leave(self, key: str) -> None:
        self._waiting[key] -= 1
        if not self._waiting[key]:
            del self._waiting[key]

    async def _open(
        self, stack: AsyncExitStack, access: Access, request: RunCode, wanted: Record
    ) -> tuple[Record, Bridge, bool]:
        """The context for a run, a connection to its bridge, and whether that had to be replaced.

        Its kernel is started if it does not run, its context created if it is a default one.
        """
        directory = self._directory(access.id, wanted.id)
        # Who restarts it removes all that there is of it first.
        async with self._changing(access.id, wanted.id):
            record = await in_thread(_record, directory)
            if record is None and wanted.id != default_context(request.language):
                raise _not_found(wanted.id)
            if record is not None:
                with contextlib.suppress(BridgeGone):
                    return record, await stack.enter_async_context(Bridge.connect(directory)), False
            await self._start(access, record or wanted, known=record is not None)
        try:
            bridge = await stack.enter_async_context(Bridge.connect(directory))
        except BridgeGone as error:
            raise KernelFailed("The kernel ended as soon as it was started; try again.") from error
        return record or wanted, bridge, record is not None

    async def _believable(
        self, frames: AsyncGenerator[CodeFrame, None], seconds: float
    ) -> AsyncGenerator[CodeFrame, None]:
        """The frames of a run; what does not end in time, or is none, ends with it ``lost``."""
        begun = asyncio.get_running_loop().time()
        deadline = begun + seconds
        async with aclosing(frames):
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        frame = await anext(frames)
                except BridgeGone as error:
                    lost, late = f"The context has ended while the code ran. {error}", False
                except TimeoutError:
                    lost, late = "The code ran past its time, and could not be interrupted.", True
                else:
                    yield frame
                    if frame.kind == "done":
                        return
                    continue
                duration = round((asyncio.get_running_loop().time() - begun) * 1000)
                yield CodeFrame("done", interrupted=late, lost=lost, duration_ms=duration)
                return

    async def _lose(self, sandbox_id: str, context_id: str) -> None:
        """Kill what is left of a context whose kernel has ended; its next run has another."""
        with log_errors(f"what is left of {context_id} of {sandbox_id} could not be killed"):
            await self._end_group(sandbox_id, context_id)

    def _count_use(self, sandbox_id: str, context_id: str) -> None:
        path = self._directory(sandbox_id, context_id) / _USE
        use = _read(path, _USES) or Use()
        # Only shown: it is not worth waiting for the disk, or an error.
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(asdict(Use(use.executions + 1, time.time()))))

    # Starting ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _changing(self, sandbox_id: str, context_id: str) -> AsyncIterator[None]:
        self._directory(sandbox_id, context_id)
        async with self._changes.holding(f"{sandbox_id}/{context_id}"):
            yield

    async def _start(self, access: Access, record: Record, *, known: bool) -> None:
        """Start a context's bridge and kernel, in place of what there is of it.

        If that fails, a ``known`` context stays one, whose kernel does not run.
        """
        await self._forget(access.id, record.id)
        directory = self._directory(access.id, record.id)
        try:
            await self._launch(access, record, directory)
            answer = await self._start_kernel(record, directory)
            if answer.kind == "unavailable":
                raise _unavailable(answer.message)
            if answer.kind == "failed":
                raise KernelFailed(f"The kernel could not be started. {answer.message}")
            await in_thread(_write_record, directory, record)
        except FileNotFoundError as error:
            raise ContainerGone("The sandbox has ended.") from error
        except BaseException:
            await self._forget(access.id, record.id)
            if known:
                with contextlib.suppress(OSError):
                    await in_thread(_write_record, directory, record)
            raise

    async def _launch(self, access: Access, record: Record, directory: Path) -> None:
        descriptors: list[int] = []
        async with access.usable() as environment:
            try:
                # Others of the sandbox are created one after the other.
                await in_thread(self._require_room, access.id, record.id)
                await in_thread(_create_files, directory, descriptors)
                await self._supervise(access.id, record, environment, descriptors)
            finally:
                close_all(descriptors)

    async def _supervise(
        self,
        sandbox_id: str,
        record: Record,
        environment: Mapping[str, str],
        descriptors: list[int],
    ) -> None:
        running = self.containers.get(sandbox_id)
        message = {
            "name": running.name,
            "command": _command_id(record.id),
            "argv": ["python3", "-c", BOOTSTRAP],
            "cwd": record.cwd,
            "env": {
                **self.containers.environment(running.slot.mode, running.spec.limits.cpu),
                **environment,
            },
        }
        answer, answer_in = os.pipe()
        # The log, the status, the answer, and what the bridge listens on.
        descriptors.insert(2, answer_in)
        try:
            said = await self.containers.launchers.supervise(message, descriptors, answer)
        except TimeoutError as error:
            raise KernelFailed("The kernel did not start in time; try again.") from error
        finally:
            os.close(answer)
        reply = json.loads(said) if said else {"error": "its supervisor died"}
        if reply.get("code") == CwdNotFound.code:
            raise CwdNotFound(str(reply["detail"]))
        if "error" in reply:
            self.containers.get(sandbox_id)
            raise Exhausted(NO_PROCESS_MESSAGE)

    async def _start_kernel(self, record: Record, directory: Path) -> Started:
        try:
            async with (
                asyncio.timeout(scaled(_START_SECONDS)),
                Bridge.connect(directory) as bridge,
            ):
                return await bridge.start(record.language, record.cwd)
        except TimeoutError as error:
            raise KernelFailed("The kernel did not start in time; try again.") from error
        except BridgeGone as error:
            code = await _exit_code(directory)
            if code == _NOT_FOUND_STATUS:
                raise _unavailable("It has no python3.") from error
            raise KernelFailed("The kernel's process ended while it was started.") from error

    def _require_room(self, sandbox_id: str, context_id: str) -> None:
        others = set(self._ids(sandbox_id)) - {context_id}
        if len(others) >= MAX_CONTEXTS:
            raise TooManyContexts(
                f"The sandbox has {len(others)} contexts, which is all that it may have. Remove "
                "one of them first."
            )

    # Ending --------------------------------------------------------------------------------

    async def _forget(self, sandbox_id: str, context_id: str) -> None:
        """Remove all there is of a context, and kill what it has started."""
        directory = self._directory(sandbox_id, context_id)
        # First: its supervisor looks whether its files are there before it lets it start.
        await in_thread(partial(shutil.rmtree, directory, ignore_errors=True))
        await self._end_group(sandbox_id, context_id)

    async def _end_group(self, sandbox_id: str, context_id: str) -> None:
        group = self._group(sandbox_id, context_id)
        patience = Patience(_END_SECONDS)
        while group.is_dir():
            kill_group(group)
            if not is_populated(group):
                with contextlib.suppress(OSError):
                    group.rmdir()
                    return
            if patience.exhausted():
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _group(self, sandbox_id: str, context_id: str) -> Path:
        groups = cgroup_layout().container(self.containers.name_of(sandbox_id))
        return groups.background_group(_command_id(context_id))

    # Files ---------------------------------------------------------------------------------

    def _require(self, sandbox_id: str, context_id: str) -> Record:
        record = _record(self._directory(sandbox_id, context_id))
        if record is None:
            raise _not_found(context_id)
        return record

    def _info(self, sandbox_id: str, context_id: str) -> ContextInfo:
        directory = self._directory(sandbox_id, context_id)
        record, use = self._require(sandbox_id, context_id), _read(directory / _USE, _USES) or Use()
        alive = is_locked(directory / _STATUS)
        return ContextInfo(**asdict(record), **asdict(use), alive=alive)

    def _ids(self, sandbox_id: str) -> list[str]:
        # Nothing, if there is no such directory yet.
        return [path.name for path in (self.paths.sandboxes / sandbox_id / _DIRECTORY).glob("*")]

    def _directory(self, sandbox_id: str, context_id: str) -> Path:
        if _ID.fullmatch(context_id) is None:
            raise _not_found(context_id)
        return self.paths.sandboxes / sandbox_id / _DIRECTORY / context_id


def default_context(language: str) -> str:
    """The id of a language's own context."""
    if language == _PYTHON:
        return DEFAULT_CONTEXT
    return f"{DEFAULT_CONTEXT}-{re.sub('[^a-z0-9]', '_', language)}"


def _wanted_context(request: RunCode) -> Record:
    if "\0" in request.code:
        raise InvalidRequest("Code cannot contain a NUL character.")
    context_id = request.context_id or default_context(request.language)
    return Record(context_id, request.language, "/workspace", time.time())


def _not_found(context_id: str) -> ContextNotFound:
    return ContextNotFound(f"The sandbox has no context {context_id[:80]!r}; create it first.")


def _unavailable(reason: str) -> InterpreterUnavailable:
    return InterpreterUnavailable(
        f"The sandbox's image cannot run this code: {reason[:1000]} Use the base code-interpreter, "
        "which has kernels for Python and JavaScript, or a template on it; for Python, "
        "`pip install ipykernel` in a recipe is enough."
    )


def _command_id(context_id: str) -> str:
    """What a context's bridge is called among the commands that run in the background."""
    return f"code-{context_id}"


def _create_files(directory: Path, descriptors: list[int]) -> None:
    """Create a context's files; add what its bridge is started with, without the answer's pipe."""
    directory.parent.mkdir(mode=0o700, exist_ok=True)
    directory.mkdir(mode=0o700)
    # It prints nothing but what nobody is to read.
    descriptors.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
    status = os.open(directory / _STATUS, _NEW_FILE, 0o600)
    descriptors.append(status)
    fcntl.flock(status, fcntl.LOCK_EX)
    descriptors.append(listen(directory).detach())


def _write_record(directory: Path, record: Record) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    write_json(directory / _RECORD, asdict(record))


def _record(directory: Path) -> Record | None:
    return _read(directory / _RECORD, _RECORDS)


async def _exit_code(directory: Path) -> int | None:
    """How a bridge has ended, which its supervisor notices a moment later; None if it has not."""
    patience = Patience(_END_SECONDS)
    while True:
        status = await in_thread(_read, directory / _STATUS, _STATUSES)
        if status is not None and status.status is not None:
            return os.waitstatus_to_exitcode(status.status)
        if patience.exhausted():
            return None
        await asyncio.sleep(_POLL_SECONDS)


def _read[T](path: Path, kind: TypeAdapter[T]) -> T | None:
    try:
        return read_record(path, kind)
    except BadRecord:
        # Empty, or just being written.
        return None
