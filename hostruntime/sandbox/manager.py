"""Sandboxes: containers that live until a deadline, and their records.

A sandbox is a directory ``sandboxes/<id>/`` with ``sandbox.json`` and the container's own files.
The directory is there before the container starts, and the record as soon as it runs; the record
is written again whenever it changes, so a new agent knows what the previous one did.  A sandbox
that ended by itself (its deadline passed, its init died) keeps its record, state ``gone`` with a
reason, for a day or until it is deleted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from hostruntime.container.cgroups import ContainerGroups, cgroup_layout
from hostruntime.container.exec import Frame
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager, ContainerSpec, RunningContainer
from hostruntime.errors import ContainerGone, ContainerPaused, InvalidRequest, NotFound
from hostruntime.host import clock
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.quotas import RunningCommands
from hostruntime.host.tasks import (
    KeyedLocks,
    cancel_and_wait,
    every,
    in_background,
    in_thread,
    log_errors,
    shielded,
)
from hostruntime.image.environment import Environment, check_variable_sizes, resolve_environment
from hostruntime.image.identity import write_identity
from hostruntime.image.store import Image, ImageStore
from hostruntime.network.policy import Policy
from hostruntime.sandbox.argv import command_argv
from hostruntime.sandbox.background import BackgroundCommands, Launch
from hostruntime.sandbox.changes import Changes
from hostruntime.sandbox.history import Gauges
from hostruntime.sandbox.interpreter import Access, Interpreter
from hostruntime.sandbox.metrics import read_gauges
from hostruntime.sandbox.record import (
    RECORD_FILE,
    Reason,
    Sandbox,
    as_running,
    attached_volumes,
    policy_of,
    read_records,
)
from hostruntime.sandbox.refusals import Refusals, with_refusals
from hostruntime.sandbox.snapshots import Snapshot, SnapshotManager, Source, image_user
from hostruntime.sandbox.usage import UsageStore
from hostruntime.sandbox.warm_pool import WarmPool
from hostruntime.volume.manager import VolumeManager
from hostruntime.volume.store import VolumeStore
from hostruntime.wire.background import CommandInfo, StartCommand
from hostruntime.wire.commands import Exec, Quota
from hostruntime.wire.interpreter import CodeFrame, RunCode
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo

SWEEP_SECONDS = 0.5
KEEP_RECORD_SECONDS = 86_400.0
_log = logging.getLogger(__name__)

Sandboxes = list[Sandbox]


@dataclass
class SandboxManager:
    """The sandboxes of one host.  For use on one event loop; call :meth:`recover` first."""

    paths: StatePaths
    containers: ContainerManager
    store: ImageStore
    usage: UsageStore = field(init=False)
    snapshots: SnapshotManager = field(init=False)
    warm: WarmPool = field(init=False)
    volumes: VolumeManager = field(init=False)
    background: BackgroundCommands = field(init=False)
    interpreter: Interpreter = field(init=False)
    commands: RunningCommands = field(default_factory=RunningCommands)
    changes: Changes = field(default_factory=Changes)
    refusals: Refusals = lambda _owner, _since: ()
    _sandboxes: dict[str, Sandbox] = field(default_factory=dict)
    _locks: KeyedLocks = field(default_factory=KeyedLocks)
    # Sandboxes that are being terminated, and why.
    _ending: dict[str, Reason] = field(default_factory=dict)
    _sweeper: asyncio.Task[None] | None = None
    # Those whose deadline is being enforced.
    _expiring: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    # To end one takes threads for a while, to pause one only the waiting for it.
    _ends_at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(16))
    _pauses_at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(128))

    def __post_init__(self) -> None:
        self.usage = UsageStore(
            self.paths.usage, self._groups, self.store.quarantine, self._gauges, self._is_paused
        )
        self.snapshots = SnapshotManager(self.paths, self.containers, self.store)
        self.warm = WarmPool(self.paths, self.containers, self.store.trash)
        self.background = BackgroundCommands(self.paths, self.containers, self._refusals_of)
        store = VolumeStore(self.paths, self.containers.instance, self.store.trash)
        self.volumes = VolumeManager(store)
        self.interpreter = Interpreter(self.paths, self.containers, self.warm.note_code)
        self.warm.end_unused = self.interpreter.end_unused

    # Lifecycle of the manager --------------------------------------------------------------

    async def recover(self) -> None:
        """Load the records; adopt the sandboxes that still run, and record how others ended."""
        await in_thread(self.snapshots.recover)
        for sandbox in await in_thread(read_records, self.paths.sandboxes, self.store):
            await self._restore(sandbox)
        running = {key: self._sandboxes[key].started_at for key in self.live()}
        attached = attached_volumes(self._sandboxes[key] for key in running)
        await in_thread(self.volumes.recover, attached)
        await in_thread(self.usage.recover, running)
        for sandbox_id in running:
            await self.background.recover(sandbox_id)
            await in_thread(self.interpreter.recover, sandbox_id)

    async def _restore(self, recorded: Sandbox) -> None:
        sandbox = recorded
        if sandbox.state == "running" and sandbox.boot != clock.boot_id():
            # Another boot, or a record by an agent that only used the wall clock.
            sandbox = sandbox.with_deadline(sandbox.deadline)
        if sandbox.state == "running" and not self._adopt(sandbox):
            sandbox = replace(sandbox, state="gone", reason="host_lost", ended_at=time.time())
        self._sandboxes[sandbox.request.id] = sandbox
        if sandbox is not recorded:
            await self._save(sandbox)

    def live(self) -> set[str]:
        """The ids of running sandboxes, which use slots and images."""
        return {key for key, sandbox in self._sandboxes.items() if sandbox.state == "running"}

    def start_sweeping(self) -> None:
        """Start enforcing deadlines and watching for containers that exit."""
        self.containers.on_exit.append(self._on_exit)
        description = "the deadlines of sandboxes could not be checked"
        self._sweeper = every(SWEEP_SECONDS, self._sweep, description)
        self.usage.start_sampling()
        self.warm.start()

    async def close(self) -> None:
        """Stop enforcing deadlines; sandboxes keep running."""
        await cancel_and_wait(self._sweeper, *self._expiring.values())
        await self.warm.close()
        await self.usage.close()
        await self.background.close()

    async def refreeze_paused(self) -> None:
        """Freeze all sandboxes recorded as paused, whatever state the previous agent left."""
        for sandbox in self.list():
            if sandbox.state == "running" and sandbox.paused:
                with log_errors(f"sandbox {sandbox.request.id} cannot be paused again"):
                    await self.containers.pause(sandbox.request.id)

    # Operations ----------------------------------------------------------------------------

    def info(self, sandbox: Sandbox) -> SandboxInfo:
        """A sandbox as the agent's API returns it."""
        return sandbox.info(held=sandbox.request.id in self.containers.held())

    def list(self) -> list[Sandbox]:
        """Every running sandbox and those that ended within the last day."""
        return list(self._sandboxes.values())

    def get(self, sandbox_id: str) -> Sandbox:
        """One sandbox; raises NotFound."""
        try:
            return self._sandboxes[sandbox_id]
        except KeyError:
            raise NotFound(f"There is no sandbox {sandbox_id!r} on this host.") from None

    async def create(self, request: CreateSandbox) -> tuple[Sandbox, bool]:
        """Start a sandbox; return it, and whether it is new (the same id starts once).

        Raises InvalidRequest, ImageNotFound, NotFound (the snapshot), VolumeMissing, VolumeInUse,
        VolumeDamaged, HostFull; then nothing is left behind.
        """
        if bool(request.image) == (request.snapshot is not None):
            raise InvalidRequest("Give either an image or a snapshot to start a sandbox from.")
        policy = policy_of(request)
        return await shielded(self._create(request, policy))

    async def _create(self, request: CreateSandbox, policy: Policy) -> tuple[Sandbox, bool]:
        async with self._locks.holding(request.id):
            if request.id in self._sandboxes:
                return self._sandboxes[request.id], False
            await self.containers.admit(request.id, Limits.of(request))
            try:
                return await self._admitted(request, policy), True
            finally:
                self.containers.dismiss(request.id)

    async def _admitted(self, request: CreateSandbox, policy: Policy) -> Sandbox:
        if request.snapshot is None:
            return await self._start_sandbox(request, policy, None)
        async with self.snapshots.use(request.snapshot) as snapshot:
            request = replace(request, image=snapshot.image_id, disk_mb=snapshot.disk_mb)
            return await self._start_sandbox(request, policy, snapshot)

    async def _start_sandbox(
        self, request: CreateSandbox, policy: Policy, snapshot: Snapshot | None
    ) -> Sandbox:
        try:
            sandbox = await in_thread(self._describe, request, snapshot)
            await self.volumes.attach(request.volume, request.id)
            running = await self._start(self._spec(sandbox, policy), snapshot)
        except BaseException:
            await self.volumes.release(request.volume, request.id)
            await self._drop(request.id, request.image)
            raise
        await self._keep(as_running(sandbox, running))
        self.usage.start(request.id, running.started_at, running.cpu_us_before)
        return self._sandboxes[request.id]

    async def _keep(self, sandbox: Sandbox) -> None:
        """Record that a sandbox runs, and its volume; stop it if the host's disk does not take it.

        Who asked for it is told that it did not start, and nobody else knows of it.
        """
        try:
            await self._save(sandbox)
            await self.volumes.keep(sandbox.request.volume)
        except Exception:
            # If that fails, it is still known, and can be deleted.
            await self.containers.stop(sandbox.request.id)
            await self.volumes.release(sandbox.request.volume, sandbox.request.id)
            await self._drop(sandbox.request.id, sandbox.image_id)
            raise

    def _describe(self, request: CreateSandbox, snapshot: Snapshot | None) -> Sandbox:
        """Create the directory of a sandbox that is about to start, and have it use its image.

        Its record is written when it runs: a new agent discards what never did, either way.
        """
        self._directory(request.id).mkdir(mode=0o700, exist_ok=True)
        image = self._image(request, snapshot)
        sandbox = Sandbox(
            request,
            "starting",
            image.id,
            str(image.tree),
            None,
            image_env=image.manifest.env,
        ).with_deadline(request.deadline)
        check_variable_sizes(self._environment(sandbox))
        return sandbox

    def _image(self, request: CreateSandbox, snapshot: Snapshot | None) -> Image:
        if snapshot is None:
            return self.store.acquire(request.image, request.id)
        return self.store.share(snapshot.image_id, image_user(snapshot.id), request.id)

    async def _start(self, spec: ContainerSpec, snapshot: Snapshot | None) -> RunningContainer:
        if snapshot is None:
            # One that is ready was started without a volume.
            warm = None if spec.volume is not None else await self.warm.claim(spec)
            return warm or await self.containers.start(spec)
        disk = self.snapshots.disk(snapshot)
        running = await self.containers.start(replace(spec, saved_disk=disk, populate=None))
        try:
            await in_thread(self.background.forget_copied, spec.owner)
            await self.snapshots.restore(snapshot, spec.owner)
        except BaseException:
            await self.containers.stop(spec.owner)
            raise
        return running

    async def snapshot(self, sandbox_id: str, snapshot_id: str) -> tuple[Snapshot, bool]:
        """Take a snapshot of a running sandbox, which keeps running
        (:mod:`hostruntime.sandbox.snapshots`).

        Raises NotFound, ContainerGone, Conflict, HostFull, HostError.
        """
        sandbox = self._running(sandbox_id)
        source = Source(sandbox_id, sandbox.image_id, Limits.of(sandbox.request))
        return await self.snapshots.capture(
            snapshot_id,
            source,
            self._locks.holding(sandbox_id),
            lambda: self._require_usable(sandbox_id),
        )

    async def terminate(self, sandbox_id: str) -> None:
        """Stop and delete a sandbox; idempotent.  Raises HostFault if the kernel fails to."""
        await shielded(self._terminate(sandbox_id))

    async def _terminate(self, sandbox_id: str) -> None:
        self.snapshots.interrupt(sandbox_id)
        async with self._locks.holding(sandbox_id):
            sandbox = self._sandboxes.get(sandbox_id)
            if sandbox is not None:
                self.usage.read(sandbox_id)
                await self.containers.stop(sandbox_id)
                await self.volumes.release(sandbox.request.volume, sandbox_id)
                await self.usage.finish(sandbox_id)
                await self._drop(sandbox_id, sandbox.image_id)

    async def set_deadline(self, sandbox_id: str, deadline: float | None) -> Sandbox:
        """Change when a sandbox ends.  Raises NotFound, ContainerGone."""
        async with self._locks.holding(sandbox_id):
            sandbox = self._running(sandbox_id)
            await self._save(sandbox.with_deadline(deadline))
            return self._sandboxes[sandbox_id]

    async def pause(self, sandbox_id: str, deadline: float | None) -> Sandbox:
        """Freeze a sandbox until :meth:`resume`, or until it ends at ``deadline``; idempotent.

        Raises NotFound, ContainerGone, HostFault (it keeps running).
        """
        return await shielded(self._pause(sandbox_id, deadline))

    async def _pause(self, sandbox_id: str, deadline: float | None) -> Sandbox:
        async with self._locks.holding(sandbox_id):
            self._running(sandbox_id)
            await self.containers.pause(sandbox_id)
            # It may have ended while it was frozen.
            sandbox = replace(self._running(sandbox_id), paused=True)
            await self._save(sandbox.with_deadline(deadline))
            self.changes.record(sandbox_id)
            return self._sandboxes[sandbox_id]

    async def resume(self, sandbox_id: str, deadline: float | None) -> Sandbox:
        """Resume a paused sandbox, which then ends at ``deadline``; idempotent.

        Raises NotFound, ContainerGone.
        """
        return await shielded(self._resume(sandbox_id, deadline))

    async def _resume(self, sandbox_id: str, deadline: float | None) -> Sandbox:
        async with self._locks.holding(sandbox_id):
            sandbox = self._running(sandbox_id)
            # Saved first, so that the sweep does not end a sandbox that was just resumed.
            await self._save(replace(sandbox, paused=False).with_deadline(deadline))
            await self.containers.resume(sandbox_id)
            self.changes.record(sandbox_id)
            return self._sandboxes[sandbox_id]

    def require_present(self, sandbox_id: str) -> None:
        """Raise NotFound or ContainerGone unless it has a container, paused or not."""
        self._running(sandbox_id)

    def exec(self, sandbox_id: str, request: Exec) -> AsyncGenerator[Frame, None]:
        """Run a command; its environment overrides the sandbox's, which overrides the image's.

        See :meth:`ContainerManager.exec`.  Raises TooManyCommands before any frame, InvalidRequest
        for an impossible command or environment.
        """
        argv = command_argv(request)
        sandbox = self._usable(sandbox_id)
        environment = {**self._environment(sandbox), **request.env}
        check_variable_sizes(environment)
        frames = self.containers.exec(
            sandbox_id,
            argv,
            cwd=request.cwd,
            env=environment,
            timeout=request.timeout_seconds,
        )
        if (refusals := self._refusals_of(sandbox_id)) is not None:
            frames = with_refusals(frames, sandbox_id, refusals)
        return self._within_quota(frames, request.quota)

    def _refusals_of(self, sandbox_id: str) -> Refusals | None:
        """What was refused a sandbox, if it can be."""
        sandbox = self._sandboxes.get(sandbox_id)
        return self.refusals if sandbox and sandbox.request.network == "restricted" else None

    def run_code(self, sandbox_id: str, request: RunCode) -> AsyncGenerator[CodeFrame, None]:
        """Run code in a kernel (:meth:`Interpreter.run`).  Raises TooManyCommands, too."""
        frames = self.interpreter.run(self.code_access(sandbox_id), request)
        return self._within_quota(frames, request.quota)

    def code_access(self, sandbox_id: str) -> Access:
        """For the interpreter.  Raises NotFound, ContainerGone, ContainerPaused."""
        sandbox, paused = self._usable(sandbox_id), partial(self._is_paused, sandbox_id)
        usable, own = partial(self._holding_usable, sandbox_id), sandbox.request.env
        return Access(sandbox_id, usable, paused, sandbox.image_env, own)

    @contextlib.asynccontextmanager
    async def _holding_usable(self, sandbox_id: str) -> AsyncIterator[Environment]:
        async with self._locks.holding(sandbox_id):
            environment = self._environment(self._usable(sandbox_id))
            check_variable_sizes(environment)
            yield environment

    async def _within_quota[T](
        self, frames: AsyncGenerator[T, None], quota: Quota | None
    ) -> AsyncGenerator[T, None]:
        with self.commands.track(quota):
            async with contextlib.aclosing(frames):
                async for frame in frames:
                    yield frame

    async def start_command(self, sandbox_id: str, request: StartCommand) -> CommandInfo:
        """Start a background command, in the environment of :meth:`exec`.

        If the caller is cancelled, it is started all the same.  Raises like
        :meth:`BackgroundCommands.start`, NotFound.
        """
        argv = command_argv(Exec(request.command, cwd=request.cwd, env=request.env))
        return await shielded(self._start_command(sandbox_id, request, argv))

    async def _start_command(
        self, sandbox_id: str, request: StartCommand, argv: Sequence[str]
    ) -> CommandInfo:
        async with self._locks.holding(sandbox_id):
            environment = {**self._environment(self._usable(sandbox_id)), **request.env}
            check_variable_sizes(environment)
            launch = Launch(request.id, request.command, argv, request.cwd, environment)
            return await self.background.start(sandbox_id, launch)

    def require_running(self, sandbox_id: str) -> str:
        """The id of a sandbox that runs, or is paused.  Raises NotFound, ContainerGone."""
        return self._running(sandbox_id).request.id

    def _environment(self, sandbox: Sandbox) -> Environment:
        host = self.containers.environment(sandbox.request.network)
        return {**resolve_environment(host, sandbox.image_env), **sandbox.request.env}

    def container_name(self, sandbox_id: str) -> str:
        """The container's name, for file operations.  Raises NotFound, ContainerGone,
        ContainerPaused."""
        self._usable(sandbox_id)
        return self.containers.get(sandbox_id).name

    # How sandboxes end ---------------------------------------------------------------------

    async def _sweep(self) -> None:
        oldest = time.time() - KEEP_RECORD_SECONDS
        for sandbox in self.list():
            sandbox_id = sandbox.request.id
            if sandbox_id in self.snapshots.frozen:
                continue  # At the next pass: the others must not wait for the copy.
            if sandbox.state == "running" and sandbox.is_expired:
                # Nobody waits for one that cannot be frozen, or for a failure.
                self._begin_to_expire(sandbox_id)
            elif sandbox.state == "gone" and (sandbox.ended_at or 0) < oldest:
                with log_errors(f"the record of sandbox {sandbox_id} could not be deleted"):
                    await self._forget(sandbox)

    async def _forget(self, sandbox: Sandbox) -> None:
        async with self._locks.holding(sandbox.request.id):
            if self._sandboxes.get(sandbox.request.id) is sandbox:
                await self._drop(sandbox.request.id, sandbox.image_id)

    def _begin_to_expire(self, sandbox_id: str) -> None:
        if sandbox_id not in self._expiring:
            description = f"sandbox {sandbox_id} could not be ended at its deadline"
            task = in_background(self._expire(sandbox_id), description)
            self._expiring[sandbox_id] = task
            task.add_done_callback(lambda _: self._expiring.pop(sandbox_id, None))

    async def _expire(self, sandbox_id: str) -> None:
        async with self._locks.holding(sandbox_id):
            sandbox = self._sandboxes.get(sandbox_id)
            # Its deadline may have changed while we waited for the lock.
            if sandbox is None or sandbox.state != "running" or not sandbox.is_expired:
                return
            if await self._paused_instead(sandbox):
                return
            async with self._ends_at_once:
                self.usage.read(sandbox_id)
                await self.containers.stop(sandbox_id)
                await self._record_end(sandbox, "expired")

    async def _paused_instead(self, sandbox: Sandbox) -> bool:
        """Pause a sandbox at its deadline if that was asked for; whether it is paused.

        One that can't be paused ends: none outlives its deadline.
        """
        seconds, sandbox_id = sandbox.request.pause_seconds, sandbox.request.id
        if seconds is None or sandbox.paused:
            return False
        with log_errors(f"sandbox {sandbox_id} could not be paused at its deadline"):
            async with self._pauses_at_once:
                await self.containers.pause(sandbox_id)
            paused = replace(sandbox, paused=True).with_deadline(time.time() + seconds)
            # Known and reported even if it can't be saved: the host's disk may be full.
            with log_errors(f"that sandbox {sandbox_id} is paused could not be saved"):
                await self._save(paused)
            self.changes.record(sandbox_id)
            return True
        return False

    async def _on_exit(self, owner: str) -> None:
        if owner not in self._sandboxes:
            return
        async with self._locks.holding(owner):
            sandbox = self._sandboxes.get(owner)
            if sandbox is not None and sandbox.state == "running":
                await self.containers.stop(owner)
                await self._record_end(sandbox, self._ending.pop(owner, "exited"))

    async def terminate_for_space(self, sandbox_id: str) -> None:
        """Terminate a sandbox immediately because the machine is running out of disk space.

        Raises HostFault if the kernel fails to.
        """
        self._ending[sandbox_id] = "out_of_disk"
        self.snapshots.interrupt(sandbox_id)
        # Killed before anything that may have to wait, so that it stops writing.
        self.containers.kill(sandbox_id)
        try:
            await self._on_exit(sandbox_id)
        finally:
            self._ending.pop(sandbox_id, None)

    async def _record_end(self, sandbox: Sandbox, reason: Reason) -> None:
        await self.volumes.release(sandbox.request.volume, sandbox.request.id)
        await self.usage.finish(sandbox.request.id)
        await in_thread(self._clear_directory, sandbox)
        ended = replace(sandbox, state="gone", reason=reason, deadline=sandbox.ends_at)
        ended = replace(ended, ended_at=time.time())
        # Recorded in memory and reported even if it cannot be saved: the disk may be full.
        self._sandboxes[sandbox.request.id] = ended
        self.changes.record(sandbox.request.id)
        await self._save(ended)

    def _clear_directory(self, sandbox: Sandbox) -> None:
        directory = self._directory(sandbox.request.id)
        self.store.release(sandbox.image_id, sandbox.request.id)
        self.store.trash.discard(directory)
        directory.mkdir(mode=0o700)

    # Pieces --------------------------------------------------------------------------------

    def _adopt(self, sandbox: Sandbox) -> bool:
        slot = self.containers.pool.slot_of(sandbox.request.id)
        if slot is None:
            return False
        spec = self._spec(sandbox, policy_of(sandbox.request))
        name = sandbox.container_name(self.containers.instance)
        running = RunningContainer(
            sandbox.request.id, name, slot, 0, sandbox.started_at, sandbox.boot_ms, spec
        )
        return self.containers.adopt(running, paused=sandbox.paused)

    def _running(self, sandbox_id: str) -> Sandbox:
        sandbox = self.get(sandbox_id)
        if sandbox.state != "running":
            raise ContainerGone(f"The sandbox {sandbox_id} is not running any more.")
        return sandbox

    def _usable(self, sandbox_id: str) -> Sandbox:
        sandbox = self._running(sandbox_id)
        if sandbox.paused:
            raise ContainerPaused("The sandbox is paused; resume it first.")
        return sandbox

    def _require_usable(self, sandbox_id: str) -> None:
        self._usable(sandbox_id)

    def _spec(self, sandbox: Sandbox, policy: Policy) -> ContainerSpec:
        request = sandbox.request
        tree, directory = Path(sandbox.image_tree), self._directory(request.id)
        populate = partial(write_identity, tree)
        spec = ContainerSpec(request.id, tree, policy, Limits.of(request), directory, populate)
        return replace(spec, volume=self.volumes.mount_point(request.volume))

    async def _save(self, sandbox: Sandbox) -> None:
        """Record the new state in memory, then on disk.  The caller holds its lock."""
        self._sandboxes[sandbox.request.id] = sandbox
        path = self._directory(sandbox.request.id) / RECORD_FILE
        await in_thread(write_json, path, asdict(sandbox))

    async def _drop(self, sandbox_id: str, image_id: str) -> None:
        self._sandboxes.pop(sandbox_id, None)
        await in_thread(self._remove, sandbox_id, image_id)

    def _remove(self, sandbox_id: str, image_id: str) -> None:
        self.store.release(image_id, sandbox_id)
        self.store.trash.discard(self._directory(sandbox_id))

    def _groups(self, sandbox_id: str) -> ContainerGroups:
        return cgroup_layout().container(self.containers.name_of(sandbox_id))

    def _gauges(self, sandbox_id: str) -> Gauges:
        return read_gauges(self.containers, sandbox_id)

    def _is_paused(self, sandbox_id: str) -> bool:
        sandbox = self._sandboxes.get(sandbox_id)
        return sandbox is not None and sandbox.paused

    def _directory(self, sandbox_id: str) -> Path:
        return self.paths.sandboxes / sandbox_id
