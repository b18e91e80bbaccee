"""The code interpreter: contexts, each with a Jupyter kernel of the image's inside the sandbox.

A context is a command that runs in the background, like those of
:mod:`hostruntime.sandbox.background`: a *bridge* (:mod:`hostruntime.container.inside_bridge`),
which has a kernel.  It is in a control group of its own within the sandbox's, so it freezes, is
accounted and ends with the sandbox, and one context ends without the others noticing.  Its
supervisor and it outlive the agent.  On disk, in the state directory::

    sandboxes/<sandbox>/contexts/<context>/
      context.json      what it is, once its kernel has run
      starting          there while another kernel is started for it
      status            how its bridge is, written and locked by its supervisor
      socket            what the bridge listens on, created here: nobody inside can reach its name
      use.json          how often it was used, and when last

What ends with its kernel, or does not keep to the protocol, is killed, and replaced when it is
used the next time, which that run's ``restarted`` says.

The first run of a sandbox may find a kernel that was started while its container waited for it
(:mod:`hostruntime.sandbox.warm_kernels`), which then is the default context's.  If anything is
wrong with that one, another is started, and nobody hears of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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

from hostruntime.container.manager import ContainerManager
from hostruntime.errors import (
    ContainerGone,
    ContextBusy,
    ContextNotFound,
    InvalidRequest,
    KernelFailed,
    TooManyContexts,
)
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.patience import scaled
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.tasks import KeyedLocks, in_thread, log_errors, run_to_completion
from hostruntime.image.environment import resolve_environment
from hostruntime.sandbox.background import is_locked
from hostruntime.sandbox.bridges import Bridge, BridgeGone
from hostruntime.sandbox.kernels import STATUS, Kernels, remove_files
from hostruntime.sandbox.warm_kernels import DEFAULT_CONTEXT, WAITING, needs_start, take
from hostruntime.wire.interpreter import CodeError, CodeFrame, ContextInfo, CreateContext, RunCode

MAX_CONTEXTS = 8
"""How many a sandbox may have."""
MAX_WAITING = 16
"""How many runs may wait for one context, or be in it."""
_PYTHON = "python"
# After its time, a run is interrupted, and killed if that does not help; the bridge does both.
_OVERTIME_SECONDS = 15.0
# A kernel that has waited answers within some milliseconds.
_ADOPTION_SECONDS = 5.0
_DIRECTORY, _RECORD, _STARTING, _USE = "contexts", "context.json", "starting", "use.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
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


_RECORDS, _USES = TypeAdapter(Record), TypeAdapter(Use)


@dataclass(frozen=True)
class Access:
    """A sandbox whose contexts are used.

    ``usable`` is held while a process is started in it, and gives its environment; it raises
    ContainerGone and ContainerPaused.  ``is_paused`` says whether its time stands still.  Of its
    environment, ``baked`` is its image's, and ``own`` is what is the sandbox's alone.
    """

    id: str
    usable: Callable[[], AbstractAsyncContextManager[Mapping[str, str]]]
    is_paused: Callable[[], bool]
    baked: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Interpreter:
    """The contexts of all sandboxes of a host.  For use on one event loop."""

    paths: StatePaths
    containers: ContainerManager
    # Told of the first run of a sandbox, and the environment that others of its image share.
    note_use: Callable[[str, Mapping[str, str]], None] = lambda _sandbox_id, _environment: None
    kernels: Kernels = field(init=False)
    # For each context: its start and end, and whose turn it is.
    _changes: KeyedLocks = field(default_factory=KeyedLocks)
    _turns: KeyedLocks = field(default_factory=KeyedLocks)
    _waiting: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.kernels = Kernels(self.containers)

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
            await self._clear(sandbox_id, context_id, known=False)

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
        """Kill what a killed agent was about to start, and a kernel that still waits; blocks."""
        for context_id in self._ids(sandbox_id):
            directory = self._directory(sandbox_id, context_id)
            if _record(directory) is None:
                shutil.rmtree(directory, ignore_errors=True)
            elif (directory / _STARTING).exists():
                _remove_all_but_record(directory)
            else:
                continue
            self.kernels.kill(sandbox_id, context_id)
        if (waiting := self._waiting_directory(sandbox_id)).is_dir():
            shutil.rmtree(waiting, ignore_errors=True)
            self.kernels.kill(sandbox_id, DEFAULT_CONTEXT)

    async def end_unused(self, sandbox_id: str) -> None:
        """End the kernel that was started while a sandbox's container waited, if it still does."""
        async with self._changing(sandbox_id, DEFAULT_CONTEXT):
            if await in_thread(self._waiting_directory(sandbox_id).is_dir):
                await self._clear(sandbox_id, DEFAULT_CONTEXT, known=False)

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
                await self._start(access, record, known=True)
            else:
                await self._start_first(access, wanted)
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
            await self.kernels.end(sandbox_id, context_id)

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
        await self._clear(access.id, record.id, known=known)
        directory = self._directory(access.id, record.id)
        try:
            if known:
                await in_thread((directory / _STARTING).touch)
            await self._launch(access, record, directory)
            await self.kernels.start(directory, record.language, record.cwd)
            await in_thread(_write_record, directory, record)
        except FileNotFoundError as error:
            raise ContainerGone("The sandbox has ended.") from error
        except BaseException:
            await self._clear(access.id, record.id, known=known)
            raise

    async def _launch(self, access: Access, record: Record, directory: Path) -> None:
        async with access.usable() as environment:
            # Others of the sandbox are created one after the other.
            await in_thread(self._require_room, access.id, record.id)
            await self.kernels.launch(access.id, record.id, directory, record.cwd, environment)

    async def _start_first(self, access: Access, record: Record) -> None:
        """Start a language's own context, or have the kernel that has waited be its."""
        if record.id != DEFAULT_CONTEXT:
            await self._start(access, record, known=False)
            return
        if not await self._adopt(access, record):
            await self._start(access, record, known=False)
        host = self.kernels.environment(access.id, {})
        shared = resolve_environment(host, access.baked)
        # The others of its image are none of this one's kind if it needs a kernel of its own.
        if not needs_start(shared, {**shared, **access.own}):
            self.note_use(access.id, shared)

    async def _adopt(self, access: Access, record: Record) -> bool:
        """Have the kernel that waited with the sandbox's container be a context's.

        False if there is none, or something is wrong with it: then another is to be started.
        """
        directory = self._directory(access.id, record.id)
        try:
            async with access.usable() as environment:
                wanted = self.kernels.environment(access.id, environment)
                waiting = self._waiting_directory(access.id)
                changes = await in_thread(take, waiting, directory, wanted)
            if changes is None:
                return False
            return await self._give_variables(access.id, record, changes)
        except (BridgeGone, OSError):
            return False

    async def _give_variables(
        self, sandbox_id: str, record: Record, changes: Mapping[str, str]
    ) -> bool:
        """Have a kernel that has waited be a context's.  Raises BridgeGone, OSError.

        If whoever wanted it leaves meanwhile, it is ended: nobody would know of it.
        """
        directory = self._directory(sandbox_id, record.id)
        try:
            async with (
                asyncio.timeout(scaled(_ADOPTION_SECONDS)),
                Bridge.connect(directory) as bridge,
            ):
                answer = await bridge.adopt(changes, record.cwd)
            if answer.kind == "ready":
                await in_thread(_write_record, directory, record)
            return answer.kind == "ready"
        except asyncio.CancelledError:
            await run_to_completion(self._clear(sandbox_id, record.id, known=False))
            raise

    def _require_room(self, sandbox_id: str, context_id: str) -> None:
        others = set(self._ids(sandbox_id)) - {context_id}
        if len(others) >= MAX_CONTEXTS:
            raise TooManyContexts(
                f"The sandbox has {len(others)} contexts, which is all that it may have. Remove "
                "one of them first."
            )

    # Ending --------------------------------------------------------------------------------

    async def _clear(self, sandbox_id: str, context_id: str, *, known: bool) -> None:
        """Kill what a context has started, and remove its files: of a ``known`` one, not what says
        that it is one."""
        directory = self._directory(sandbox_id, context_id)
        # First: its supervisor looks whether its files are there before it lets it start.
        if known:
            await in_thread(_remove_all_but_record, directory)
        else:
            await in_thread(partial(shutil.rmtree, directory, ignore_errors=True))
        if context_id == DEFAULT_CONTEXT:
            waiting = self._waiting_directory(sandbox_id)
            await in_thread(partial(shutil.rmtree, waiting, ignore_errors=True))
        await self.kernels.end(sandbox_id, context_id)

    # Files ---------------------------------------------------------------------------------

    def _require(self, sandbox_id: str, context_id: str) -> Record:
        record = _record(self._directory(sandbox_id, context_id))
        if record is None:
            raise _not_found(context_id)
        return record

    def _info(self, sandbox_id: str, context_id: str) -> ContextInfo:
        directory = self._directory(sandbox_id, context_id)
        record, use = self._require(sandbox_id, context_id), _read(directory / _USE, _USES) or Use()
        alive = is_locked(directory / STATUS)
        return ContextInfo(**asdict(record), **asdict(use), alive=alive)

    def _ids(self, sandbox_id: str) -> list[str]:
        # Nothing, if there is no such directory yet.
        return [path.name for path in (self.paths.sandboxes / sandbox_id / _DIRECTORY).glob("*")]

    def _directory(self, sandbox_id: str, context_id: str) -> Path:
        if _ID.fullmatch(context_id) is None:
            raise _not_found(context_id)
        return self.paths.sandboxes / sandbox_id / _DIRECTORY / context_id

    def _waiting_directory(self, sandbox_id: str) -> Path:
        return self.paths.sandboxes / sandbox_id / WAITING


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


def _write_record(directory: Path, record: Record) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    write_json(directory / _RECORD, asdict(record))
    (directory / _STARTING).unlink(missing_ok=True)


def _remove_all_but_record(directory: Path) -> None:
    remove_files(directory)
    for name in (_USE, _STARTING):
        (directory / name).unlink(missing_ok=True)


def _record(directory: Path) -> Record | None:
    return _read(directory / _RECORD, _RECORDS)


def _read[T](path: Path, kind: TypeAdapter[T]) -> T | None:
    try:
        return read_record(path, kind)
    except BadRecord:
        # Empty, or just being written.
        return None
