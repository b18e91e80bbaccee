"""Containers by owner: everything a sandbox and a build have in common.

A :class:`ContainerManager` puts the pieces together: a slot of the network, a mounted root, a
running LXC container.  A start that fails undoes what it did so far; stopping is idempotent and
leaves only the container's ``directory``.  A container that exits by itself is dismantled
immediately, and the ``on_exit`` callbacks are called.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hostruntime.container import apparmor
from hostruntime.container.capacity import Capacity
from hostruntime.container.cgroups import (
    ContainerGroups,
    cgroup_layout,
    freeze_group,
    is_frozen,
    is_populated,
    kill_group,
    pids_under,
)
from hostruntime.container.config import ContainerConfig
from hostruntime.container.disk import Disks
from hostruntime.container.dismantling import (
    end_processes,
    kill_all_but_init,
    open_pidfd,
    remove_remains,
)
from hostruntime.container.exec import ExecRequest, Exited, Frame, run_command
from hostruntime.container.files import FileService
from hostruntime.container.host_files import HOSTNAME, container_environment
from hostruntime.container.launcher import LauncherLost, LauncherPool
from hostruntime.container.limits import Limits
from hostruntime.container.runtime_layer import RuntimeTrees
from hostruntime.container.seccomp import write_profile
from hostruntime.errors import Conflict, ContainerGone, ExecKilled, Exhausted, HostFault, HostFull
from hostruntime.host import kernel
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.patience import Patience
from hostruntime.host.rundir import RunDir
from hostruntime.host.tasks import KeyedLocks, in_background, in_thread, log_errors, shielded
from hostruntime.image.trees import Check
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool
from hostruntime.wire.files import Survey

LOG_FILE = "lxc.log"
_FREEZE_SECONDS = 5.0
_FREEZE_POLL_SECONDS = 0.002
# How long a started container's first command is expected, and a spare one's (at most so long; it
# is prepared for again when it is handed over).
_FIRST_COMMAND_SECONDS, _SPARE_SECONDS = 60.0, 3600.0
_log = logging.getLogger(__name__)

OnExit = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class ContainerSpec:
    """What to start: ``owner`` is unique on the host, ``directory`` gets the log.

    ``populate`` is called in a thread with the empty writable layer, to put files into it.
    ``saved_disk`` is a disk to start from instead of an empty one (:meth:`save_disk`).
    ``volume`` is mounted at /persist.
    A ``spare`` one waits to become another owner's (:meth:`ContainerManager.hand_over`).
    """

    owner: str
    image_tree: Path
    policy: Policy
    limits: Limits
    directory: Path
    populate: Callable[[Path], None] | None = None
    saved_disk: Path | None = None
    spare: bool = False
    volume: Path | None = None


@dataclass(frozen=True)
class RunningContainer:
    """A running container.  Its ``name`` is also that of its control groups.

    ``cpu_us_before`` is what it had used before it was its owner's, if that is worth knowing.
    """

    owner: str
    name: str
    slot: Slot
    init_pid: int
    started_at: float
    boot_ms: float
    spec: ContainerSpec
    cpu_us_before: int = 0


def roots_dir(instance: Instance) -> Path:
    """Where the roots of an instance's containers are mounted."""
    return RunDir.of(instance).roots


def lxc_dir(instance: Instance) -> Path:
    """LXC's directory (lxcpath), which a container's root user must be able to enter."""
    return RunDir.of(instance).lxc


@dataclass
class ContainerManager:
    """Starts containers, runs commands in them and stops them.  One per agent's event loop."""

    paths: StatePaths
    instance: Instance
    pool: SlotPool
    launchers: LauncherPool
    capacity: Capacity = field(default_factory=Capacity)
    disks: Disks = field(init=False)
    runtime: RuntimeTrees = field(init=False)
    on_exit: list[OnExit] = field(default_factory=list)
    # Stops a spare container, if there is one, when there is no slot for another.
    stop_spare: Callable[[], Awaitable[bool]] | None = None
    _running: dict[str, RunningContainer] = field(default_factory=dict)
    # The names of containers that were started for another owner.
    _names: dict[str, str] = field(default_factory=dict)
    _held: set[str] = field(default_factory=set)
    _locks: KeyedLocks = field(default_factory=KeyedLocks)
    _monitors: dict[str, int] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.disks = Disks(self.paths, self.instance)
        self.runtime = RuntimeTrees(self.paths)

    @property
    def files(self) -> FileService:
        """File operations, by container name."""
        return FileService(self.launchers)

    @property
    def roots(self) -> Path:
        """Where the roots of this instance's containers are mounted."""
        return roots_dir(self.instance)

    def running(self) -> dict[str, RunningContainer]:
        """The running containers by owner, without spare ones."""
        return {owner: each for owner, each in self._running.items() if not each.spec.spare}

    def get(self, owner: str) -> RunningContainer:
        """One running container; raises ContainerGone."""
        try:
            return self._running[owner]
        except KeyError:
            raise ContainerGone(f"The container of {owner} is not running.") from None

    # Start and stop ------------------------------------------------------------------------

    def require_space(self) -> None:
        """Raise HostFull unless the host's disk has space for one more container."""
        self.disks.require_space()

    async def admit(self, owner: str, limits: Limits) -> None:
        """Reserve what a container will take, before anything of it is made; idempotent.

        :meth:`stop` ends it, and so does a start that fails; where none follows, call
        :meth:`dismiss`.  Raises HostFull; then nothing is reserved.
        """
        await in_thread(self.require_space)
        self.capacity.reserve(owner, limits)

    def dismiss(self, owner: str) -> None:
        """End an admission unless the owner's container runs; idempotent."""
        if owner not in self._running:
            self.capacity.release(owner)

    async def start(self, spec: ContainerSpec) -> RunningContainer:
        """Start a container; a failed start leaves nothing behind.

        If the caller is cancelled, the start still completes: the caller must then :meth:`stop` the
        owner.  Raises HostFull, Conflict (the owner has a container), HostError.
        """
        return await shielded(self._start(spec))

    async def _start(self, spec: ContainerSpec) -> RunningContainer:
        async with self._locks.holding(spec.owner):
            if spec.owner in self._running:
                raise Conflict(f"{spec.owner} already has a running container.")
            if not spec.spare:
                self.capacity.reserve(spec.owner, spec.limits)
            start = time.monotonic()
            try:
                slot = await self._acquire_slot(spec)
                message = await asyncio.to_thread(self._prepare, spec, slot)
                init_pid = await self.launchers.start(message)
            except BaseException:
                await self._dismantle(spec.owner)
                self.capacity.release(spec.owner)
                raise
            boot_ms = (time.monotonic() - start) * 1000
            name = self.name_of(spec.owner)
            running = RunningContainer(spec.owner, name, slot, init_pid, time.time(), boot_ms, spec)
            self._track(running)
            self._expect_command(running)
            return running

    async def _acquire_slot(self, spec: ContainerSpec) -> Slot:
        while True:
            try:
                return await asyncio.to_thread(self.pool.acquire, spec.owner, spec.policy)
            except HostFull:
                if spec.spare or self.stop_spare is None or not await self.stop_spare():
                    raise

    async def hand_over(self, owner: str, spec: ContainerSpec) -> RunningContainer:
        """Make the paused container of ``owner`` that of ``spec.owner``, and let it run.

        Its image, limits and network mode must be those of ``spec``.  Raises ContainerGone,
        Conflict, HostError, OSError; then nothing is left of either.
        """
        return await shielded(self._hand_over(owner, spec))

    async def _hand_over(self, owner: str, spec: ContainerSpec) -> RunningContainer:
        async with self._locks.holding(spec.owner), self._locks.holding(owner):
            if spec.owner in self._running:
                raise Conflict(f"{spec.owner} already has a running container.")
            start, container = time.monotonic(), self.get(owner)
            if owner not in self._monitors:
                raise ContainerGone(f"The container of {owner} is exiting.")
            self._names[spec.owner] = container.name
            try:
                await asyncio.to_thread(self._reassign, container, spec)
            except BaseException:
                self._untrack(owner)
                for each in (spec.owner, owner):
                    await self._dismantle(each)
                raise
            boot_ms = (time.monotonic() - start) * 1000
            running = replace(
                container, owner=spec.owner, started_at=time.time(), boot_ms=boot_ms, spec=spec
            )
            self._retrack(container, running)
            self._thaw(running)
            self._expect_command(running)
            return running

    def _reassign(self, container: RunningContainer, spec: ContainerSpec) -> None:
        if not is_populated(self._groups(container.owner).unified):
            raise ContainerGone(f"The container of {container.owner} has exited.")
        self.pool.reassign(container.owner, spec.owner, spec.policy)
        self.disks.rename(container.owner, spec.owner)
        # Its log stays open, whatever it is called; and there may be a kernel's files.
        for path in list(container.spec.directory.iterdir()):
            path.rename(spec.directory / path.name)
        container.spec.directory.rmdir()

    def _retrack(self, container: RunningContainer, running: RunningContainer) -> None:
        """Watch the monitor of a container on behalf of its new owner, without a gap."""
        pidfd = self._monitors.pop(container.owner)
        del self._running[container.owner]
        self._running[running.owner], self._monitors[running.owner] = running, pidfd
        loop = asyncio.get_running_loop()
        loop.remove_reader(pidfd)
        # An exit that was noticed in between is noticed again.
        loop.add_reader(pidfd, self._on_monitor_exit, running)

    async def stop(self, owner: str) -> None:
        """Kill, unmount, release slot and disk; idempotent; leaves ``directory``.

        Raises HostFault if the kernel does not release something; it may be called again.
        """
        await shielded(self._stop(owner, keep_disk=False))

    async def halt(self, owner: str) -> None:
        """Like :meth:`stop`, but keep the disk, for a capture."""
        await shielded(self._stop(owner, keep_disk=True))

    async def _stop(self, owner: str, *, keep_disk: bool) -> None:
        async with self._locks.holding(owner):
            self._untrack(owner)
            await self._dismantle(owner, keep_disk=keep_disk)
            self.capacity.release(owner)

    async def pause(self, owner: str) -> None:
        """Freeze everything in a container; idempotent.  Its memory is retained.

        See cgroup.freeze in the kernel's cgroup-v2.rst.  Running commands are frozen too, but their
        time limits keep running.  Raises ContainerGone, HostFault.
        """
        await shielded(self._pause(owner))

    async def _pause(self, owner: str) -> None:
        async with self._locks.holding(owner):
            running = self.get(owner)
            await self.launchers.gate.block(running.name)
            group = self._groups(owner).unified
            freeze_group(group, frozen=True)
            patience = Patience(_FREEZE_SECONDS, lambda: pids_under(group))
            while not is_frozen(group):
                if not is_populated(group):
                    self.launchers.gate.unblock(running.name)
                    raise ContainerGone(f"The container of {owner} ended as it was paused.")
                if patience.exhausted():
                    self._thaw(running)
                    raise HostFault("The kernel did not freeze the sandbox; it keeps running.")
                await asyncio.sleep(_FREEZE_POLL_SECONDS)

    async def resume(self, owner: str) -> None:
        """Resume a paused container; idempotent.  Raises ContainerGone."""
        async with self._locks.holding(owner):
            self._thaw(self.get(owner))

    def _thaw(self, running: RunningContainer) -> None:
        if running.owner not in self._held:
            freeze_group(self._groups(running.owner).unified, frozen=False)
        self.launchers.gate.unblock(running.name)

    async def hold(self, owner: str, reason: str | None) -> None:
        """Freeze a container until :meth:`release`, independently of any pause; idempotent.

        Callers get ``reason`` as an error; without one, they wait.  System calls in progress are
        not waited for: a long write(2) still completes.  Raises ContainerGone.
        """
        running = self.get(owner)
        self._held.add(owner)
        await self.launchers.gate.hold(running.name, reason)
        if owner in self._held and self._running.get(owner) is running:
            freeze_group(self._groups(owner).unified, frozen=True)

    async def release(self, owner: str) -> None:
        """Let a held container continue; idempotent.  Waits while its disk is being copied."""
        self._held.discard(owner)
        name, gate = self.name_of(owner), self.launchers.gate
        await gate.release(name)
        async with gate.closed(name):
            if owner not in self._held and not gate.is_blocked(name):
                freeze_group(self._groups(owner).unified, frozen=False)

    def held(self) -> set[str]:
        """The owners whose containers are held."""
        return set(self._held)

    def disk_is_full(self, owner: str) -> bool:
        """Whether an owner's disk is practically full."""
        return self.disks.is_full(owner)

    def disk_used(self, owner: str) -> tuple[int, int]:
        """The bytes and inodes in use on an owner's disk.  Raises OSError."""
        return self.disks.used(owner)

    def disk_allocated(self, owner: str) -> int:
        """The number of bytes that :meth:`save_disk` would copy.  Raises OSError."""
        return self.disks.allocated(owner)

    def flush_disk(self, owner: str) -> None:
        """Flush an owner's disk in preparation for :meth:`save_disk`; blocks."""
        self.disks.flush(owner)

    def save_disk(self, owner: str, target: Path, check: Check) -> None:
        """Copy an owner's disk to ``target`` (:meth:`Disks.save`); blocks."""
        self.disks.save(owner, target, check)

    def layer(self, owner: str) -> Path:
        """An owner's writable layer, the overlay's upper directory, with the container's ids."""
        return self.disks.path(owner) / "upper"

    def adopt(self, running: RunningContainer, *, paused: bool = False) -> bool:
        """Adopt a container that outlived the previous agent; False if it is not running.

        If it is not ``paused`` it is thawed: the previous agent may have died while freezing it.
        """
        self._names[running.owner] = running.name
        init_pid = self._groups(running.owner).init_pid()
        if init_pid is None:
            del self._names[running.owner]
            return False
        for group in self._groups(running.owner).exec_groups():
            # The callers of these commands lost their connections with the previous agent.
            kill_group(group)
        if not paused:
            freeze_group(self._groups(running.owner).unified, frozen=False)
        self.capacity.adopt(running.owner, running.spec.limits)
        self._track(replace(running, init_pid=init_pid))
        return True

    async def close(self) -> None:
        """Stop watching; the containers keep running."""
        for owner in list(self._running):
            self._untrack(owner)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # Commands and files inside -------------------------------------------------------------

    async def exec(
        self,
        owner: str,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        timeout: float | None,
        merge_output: bool = False,
        stdin: int | None = None,
    ) -> AsyncGenerator[Frame, None]:
        """Run ``argv``; iterate its frames under ``contextlib.aclosing`` (closing kills the tree).

        ``env`` is added to the container's environment; ``timeout`` is in seconds.
        ``merge_output`` gives both streams one pipe, which preserves their order; everything then
        arrives as stdout.  ``stdin`` is a descriptor to read from instead of the null device; the
        caller closes it.  Raises ContainerGone, CwdNotFound, ExecKilled (the container exited).
        """
        running = self.get(owner)
        environment = {**self.environment(running.slot.mode), **env}
        request = ExecRequest(argv, cwd, environment, timeout, merge_output, stdin)
        try:
            frames = run_command(self.launchers, self._groups(owner), request)
            async with aclosing(frames):
                async for frame in frames:
                    if isinstance(frame, Exited) and frame.signal == signal.SIGKILL:
                        self._check_not_stopped(running)
                    yield frame
        except (Exhausted, HostFault, LauncherLost):
            self._check_not_stopped(running)
            raise

    async def survey(
        self, owner: str, path: str, max_bytes: int, directories: Sequence[str]
    ) -> Survey:
        """Look into a container from inside, at one entry into it.  Raises HostError."""
        return await self.files.survey(self.get(owner).name, path, max_bytes, directories)

    def environment(self, mode: str) -> dict[str, str]:
        """The environment of every process in a container of this network mode."""
        return container_environment(mode, self.pool)

    def _check_not_stopped(self, running: RunningContainer) -> None:
        if self._running.get(running.owner) is not running:
            raise ExecKilled("The sandbox ended while the command ran.", signal=int(signal.SIGKILL))

    async def kill_all_but_init(self, owner: str) -> None:
        """Kill every process in the container except its init.  Raises ContainerGone."""
        running = self.get(owner)
        await asyncio.to_thread(kill_all_but_init, self._groups(owner), running.init_pid)

    def kill(self, owner: str) -> None:
        """Kill everything in a container immediately, including init; :meth:`stop` must follow.

        Processes that fork rapidly or ignore signals are killed as well.
        """
        kill_group(self._groups(owner).unified)

    def kill_commands(self) -> None:
        """Kill all running commands, for an agent about to exit; containers keep running."""
        for owner in self._running:
            for group in self._groups(owner).exec_groups():
                kill_group(group)

    # Pieces --------------------------------------------------------------------------------

    def _prepare(self, spec: ContainerSpec, slot: Slot) -> dict[str, object]:
        """Prepare a start; return the message with which a launcher continues."""
        label = apparmor.profile_name(self.instance)
        if label is not None:
            apparmor.ensure_loaded(label)
        self.disks.attach(spec.owner, spec.limits.disk_size_mb, spec.saved_disk)
        if spec.saved_disk is not None and self.layer(spec.owner).is_dir():
            self.runtime.refresh(spec.policy, spec.image_tree, self.layer(spec.owner))
        if spec.populate is not None:
            upper = self.layer(spec.owner)
            upper.mkdir(mode=0o755)
            spec.populate(upper)
        return self._start_message(spec, slot)

    def _start_message(self, spec: ContainerSpec, slot: Slot) -> dict[str, object]:
        name = self.name_of(spec.owner)
        mount_dir = self.roots / name
        spec.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        label = apparmor.profile_name(self.instance)
        config = ContainerConfig(
            name=name,
            hostname=HOSTNAME,
            root=mount_dir / "merged",
            id_base=slot.id_base,
            netns=slot.netns,
            limits=spec.limits,
            seccomp=write_profile(RunDir.of(self.instance).root),
            apparmor=label and apparmor.start_profile(label),
            log=spec.directory / LOG_FILE,
        )
        rootfs = {
            "mounts": str(mount_dir),
            "image_tree": str(spec.image_tree),
            "runtime_tree": str(self.runtime.tree(spec.policy, spec.image_tree)),
            "writable": str(self.disks.path(spec.owner)),
            "sysfs": str(slot.sysfs) if slot.sysfs is not None else None,
            "volume": str(spec.volume) if spec.volume is not None else None,
            "id_base": slot.id_base,
        }
        items = config.items(cgroup_layout())
        return {
            "name": name,
            "log": str(config.log),
            "rootfs": rootfs,
            "config": items,
            "background": spec.spare,
        }

    def _track(self, running: RunningContainer) -> None:
        self._running[running.owner] = running
        monitor = kernel.parent_of(running.init_pid)
        pidfd = open_pidfd(monitor) if monitor is not None else None
        if pidfd is None:
            self._schedule_cleanup(running)
            return
        self._monitors[running.owner] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_monitor_exit, running)

    def _on_monitor_exit(self, running: RunningContainer) -> None:
        # The pidfd of an exited monitor stays readable forever.
        asyncio.get_running_loop().remove_reader(self._monitors[running.owner])
        self._schedule_cleanup(running)

    def _untrack(self, owner: str) -> None:
        self._running.pop(owner, None)
        self._held.discard(owner)
        pidfd = self._monitors.pop(owner, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    async def _handle_exit(self, running: RunningContainer) -> None:
        """Dismantle a container that exited by itself, and call the ``on_exit`` callbacks."""
        async with self._locks.holding(running.owner):
            if self._running.get(running.owner) is not running:
                return
            self._untrack(running.owner)
            await self._dismantle(running.owner, keep_disk=True)
            self.capacity.release(running.owner)
        # The disk is kept until the owner stops the container: it may still be captured.
        for callback in self.on_exit:
            with log_errors(f"the exit of {running.name} could not be reported"):
                await callback(running.owner)

    def _expect_command(self, running: RunningContainer) -> None:
        """Have the launchers prepare for the first command, which mostly comes at once."""
        seconds = _SPARE_SECONDS if running.spec.spare else _FIRST_COMMAND_SECONDS
        work = self.launchers.prepare(running.name, seconds)
        self._start_task(work, f"no command of {running.name} could be prepared for")

    def _schedule_cleanup(self, running: RunningContainer) -> None:
        description = f"{running.name} exited and could not be cleaned up"
        self._start_task(self._handle_exit(running), description)

    def _start_task(self, work: Coroutine[Any, Any, None], description: str) -> None:
        task = in_background(work, description)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dismantle(self, owner: str, *, keep_disk: bool = False) -> None:
        name = self.name_of(owner)
        groups = self._groups(owner)
        await asyncio.to_thread(end_processes, groups)
        # What the launchers have in there holds its mounts and its network.  Not before its init
        # has exited: they could enter it again.
        await self.launchers.forget(name)
        work = [asyncio.to_thread(self._remove_remains, owner, groups)]
        if not keep_disk:
            # At the same time: both mostly wait for the kernel.
            work.append(asyncio.to_thread(self.disks.release, owner))
        for result in await asyncio.gather(*work, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        self._names.pop(owner, None)

    def _remove_remains(self, owner: str, groups: ContainerGroups) -> None:
        remove_remains(groups, self.roots / groups.name)
        self.pool.release(owner)

    def _groups(self, owner: str) -> ContainerGroups:
        return cgroup_layout().container(self.name_of(owner))

    def name_of(self, owner: str) -> str:
        """The name of an owner's container and control groups."""
        return self._names.get(owner) or self.instance.container_name(owner)
