"""Containers by owner: everything a sandbox and a build have in common.

A :class:`ContainerManager` puts the pieces together: a slot of the network, a mounted root, a
running LXC container.  Starting undoes whatever it did when a later piece fails; stopping is
idempotent and leaves only the container's ``directory``.  A container that ends by itself is
taken apart at once, and whoever asked to be told of it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path

from hostruntime.container import apparmor
from hostruntime.container.cgroups import (
    ContainerGroups,
    Limits,
    cgroup_layout,
    freeze_group,
    is_frozen,
    kill_group,
    pids_below,
    pids_in,
    populated,
    signal_group,
)
from hostruntime.container.config import ContainerConfig
from hostruntime.container.disk import Disks
from hostruntime.container.exec import ExecRequest, Exited, Frame, run_command
from hostruntime.container.files import FileService
from hostruntime.container.launcher import LauncherLost, LauncherPool
from hostruntime.container.lent_files import HOSTNAME, container_environment
from hostruntime.container.rootfs import unmount_rootfs
from hostruntime.container.runtime_layer import RuntimeTrees
from hostruntime.container.seccomp import profile_in
from hostruntime.errors import Conflict, ContainerGone, ExecKilled, Exhausted, HostFault
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.rundir import RunDir
from hostruntime.host.tasks import KeyedLocks, in_background, log_errors, shielded
from hostruntime.image.trees import Check
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool

_MONITOR_GRACE_SECONDS = 5.0
_STRAYS_GRACE_SECONDS = 5.0
_BUSY_GROUPS_SECONDS = 2.0
_FREEZE_SECONDS = 5.0
_FREEZE_LOOKS_SECONDS = 0.002
_log = logging.getLogger(__name__)

OnExit = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class ContainerSpec:
    """What to start: ``owner`` is unique on the host, ``directory`` gets the log.

    ``provide`` is called with the empty writable layer, in a thread, to put files in.
    ``saved_disk`` is what to begin with instead of an empty one (:meth:`save_disk`).
    """

    owner: str
    image_tree: Path
    policy: Policy
    limits: Limits
    directory: Path
    provide: Callable[[Path], None] | None = None
    saved_disk: Path | None = None


@dataclass(frozen=True)
class Running:
    """A running container."""

    owner: str
    name: str
    slot: Slot
    init_pid: int
    started_at: float
    boot_ms: float
    spec: ContainerSpec


def roots_of(instance: Instance) -> Path:
    """Where the roots of an instance's containers are mounted."""
    return RunDir.of(instance).roots


def lxcpath_of(instance: Instance) -> Path:
    """LXC's directory, which LXC wants a container's root to be able to enter."""
    return RunDir.of(instance).lxc


@dataclass
class ContainerManager:
    """Starts, runs commands in, and stops containers.  One per agent, on its event loop."""

    paths: StatePaths
    instance: Instance
    pool: SlotPool
    launchers: LauncherPool
    disks: Disks = field(init=False)
    runtime: RuntimeTrees = field(init=False)
    on_exit: list[OnExit] = field(default_factory=list)
    _running: dict[str, Running] = field(default_factory=dict)
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
        return roots_of(self.instance)

    def running(self) -> dict[str, Running]:
        """The running containers by owner."""
        return dict(self._running)

    def get(self, owner: str) -> Running:
        """One running container; raises ContainerGone."""
        try:
            return self._running[owner]
        except KeyError:
            raise ContainerGone(f"The container of {owner} is not running.") from None

    # Start and stop ------------------------------------------------------------------------

    async def start(self, spec: ContainerSpec) -> Running:
        """Start a container; on any failure nothing is left.

        A cancelled caller leaves the start to complete: it must then :meth:`stop` the owner.
        Raises HostFull, Conflict (the owner has one), HostError.
        """
        return await shielded(self._start(spec))

    async def _start(self, spec: ContainerSpec) -> Running:
        async with self._locks.holding(spec.owner):
            if spec.owner in self._running:
                raise Conflict(f"{spec.owner} already has a running container.")
            began = time.monotonic()
            try:
                await asyncio.to_thread(self._prepare, spec)
                slot = await asyncio.to_thread(self.pool.acquire, spec.owner, spec.policy)
                message = await asyncio.to_thread(self._start_message, spec, slot)
                init_pid = await self.launchers.start(message)
            except BaseException:
                await self._dismantle(spec.owner)
                await asyncio.to_thread(self.disks.release, spec.owner)
                raise
            boot_ms = (time.monotonic() - began) * 1000
            name = self.name_of(spec.owner)
            running = Running(spec.owner, name, slot, init_pid, time.time(), boot_ms, spec)
            self._take_up(running)
            return running

    async def stop(self, owner: str) -> None:
        """Kill, unmount, give slot and disk back; idempotent; leaves ``directory``.

        Raises HostFault when the kernel does not let go of something; it may be called again.
        """
        await shielded(self._stop(owner, keep_disk=False))

    async def halt(self, owner: str) -> None:
        """:meth:`stop`, but keep the disk, for a capture."""
        await shielded(self._stop(owner, keep_disk=True))

    async def _stop(self, owner: str, *, keep_disk: bool) -> None:
        async with self._locks.holding(owner):
            self._forget(owner)
            await self._dismantle(owner)
            if not keep_disk:
                await asyncio.to_thread(self.disks.release, owner)

    async def pause(self, owner: str) -> None:
        """Freeze everything in a container; idempotent.  Its memory stays where it is.

        "freezing" of a group: cgroup.freeze in the kernel's cgroup-v2.rst.  A command under way
        stands still too, while the time it may take goes on.  Raises ContainerGone, HostFault.
        """
        await shielded(self._pause(owner))

    async def _pause(self, owner: str) -> None:
        async with self._locks.holding(owner):
            running = self.get(owner)
            await self.launchers.gate.bar(running.name)
            group = self._groups(owner).unified
            freeze_group(group, frozen=True)
            patience = Patience(_FREEZE_SECONDS, lambda: pids_below(group))
            while not is_frozen(group):
                if not populated(group):
                    self.launchers.gate.admit(running.name)
                    raise ContainerGone(f"The container of {owner} ended as it was paused.")
                if patience.exhausted():
                    self._thaw(running)
                    raise HostFault("The kernel did not freeze the sandbox; it runs on.")
                await asyncio.sleep(_FREEZE_LOOKS_SECONDS)

    async def resume(self, owner: str) -> None:
        """Let a paused container run on; idempotent.  Raises ContainerGone."""
        async with self._locks.holding(owner):
            self._thaw(self.get(owner))

    def _thaw(self, running: Running) -> None:
        if running.owner not in self._held:
            freeze_group(self._groups(running.owner).unified, frozen=False)
        self.launchers.gate.admit(running.name)

    async def hold(self, owner: str, words: str | None) -> None:
        """Freeze a container until :meth:`let_go`, whether or not it is paused as well; idempotent.

        Who wants something of it is told ``words``; without any, they wait.  What is in the kernel
        already is not waited for: a long write(2) goes on to its end.  Raises ContainerGone.
        """
        running = self.get(owner)
        self._held.add(owner)
        await self.launchers.gate.hold(running.name, words)
        if owner in self._held and self._running.get(owner) is running:
            freeze_group(self._groups(owner).unified, frozen=True)

    async def let_go(self, owner: str) -> None:
        """Let a container that was held run on; idempotent.  Waits for who copies its disk."""
        self._held.discard(owner)
        name, gate = self.name_of(owner), self.launchers.gate
        await gate.let_go(name)
        async with gate.shut(name):
            if owner not in self._held and not gate.is_barred(name):
                freeze_group(self._groups(owner).unified, frozen=False)

    def held(self) -> set[str]:
        """Whose containers are held."""
        return set(self._held)

    def require_room(self) -> None:
        """Raise HostFull unless the host's disk has room for one more container's."""
        self.disks.require_room()

    def disk_is_full(self, owner: str) -> bool:
        """Whether next to nothing more can be written to an owner's disk."""
        return self.disks.is_full(owner)

    def disk_used(self, owner: str) -> tuple[int, int]:
        """How many bytes and files are on an owner's disk.  Raises OSError."""
        return self.disks.used(owner)

    def disk_allocated(self, owner: str) -> int:
        """How many bytes :meth:`save_disk` would have to copy.  Raises OSError."""
        return self.disks.allocated(owner)

    def flush_disk(self, owner: str) -> None:
        """Get an owner's disk ready for :meth:`save_disk`; blocks as long as the disk does."""
        self.disks.flush(owner)

    def save_disk(self, owner: str, target: Path, check: Check) -> None:
        """Copy an owner's disk to ``target`` (:meth:`Disks.save`); blocks."""
        self.disks.save(owner, target, check)

    def layer(self, owner: str) -> Path:
        """An owner's writable layer, the overlay's upper directory; ids are those of inside."""
        return self.disks.path(owner) / "upper"

    def adopt(self, running: Running, *, paused: bool = False) -> bool:
        """Take up a container that outlived the last agent; False when it does not run.

        One that is not ``paused`` is thawed: the last agent may have died while it froze it.
        """
        init_pid = self._groups(running.owner).init_pid()
        if init_pid is None:
            return False
        for group in self._groups(running.owner).exec_groups():
            # Whoever waited for these commands went away with the last agent.
            kill_group(group)
        if not paused:
            freeze_group(self._groups(running.owner).unified, frozen=False)
        self._take_up(replace(running, init_pid=init_pid))
        return True

    async def close(self) -> None:
        """Stop watching; the containers stay."""
        for owner in list(self._running):
            self._forget(owner)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # What runs inside ----------------------------------------------------------------------

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

        ``env`` is laid over the container's environment; ``timeout`` is in seconds.
        ``merge_output`` gives both streams one pipe, so that their order is kept; all of it then
        arrives as stdout.  ``stdin`` is a descriptor to read from instead of the null device, the
        caller's to close.  Raises ContainerGone, CwdNotFound, ExecKilled (the container ended).
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

    async def text_of(self, owner: str, path: str, max_bytes: int) -> bytes:
        """The beginning of a file of a container, read from inside.  Raises HostError."""
        async with self.files.read(self.get(owner).name, path, directories=False) as opened:
            data = b""
            async for piece in opened.content:
                data += piece
                if len(data) >= max_bytes:
                    break
            return data[:max_bytes]

    async def names_in(self, owner: str, directory: str) -> list[str]:
        """What is in a directory of a container, seen from inside.  Raises HostError."""
        async with self.files.read(self.get(owner).name, directory) as opened:
            return [entry.name for entry in opened.entries or ()]

    def environment(self, mode: str) -> dict[str, str]:
        """What every process in a container of a network mode begins with."""
        return container_environment(mode, self.pool)

    def _check_not_stopped(self, running: Running) -> None:
        if self._running.get(running.owner) is not running:
            raise ExecKilled("The sandbox ended while the command ran.", signal=int(signal.SIGKILL))

    async def kill_strays(self, owner: str) -> None:
        """Kill everything in the container but its init.  Raises ContainerGone."""
        running = self.get(owner)
        await asyncio.to_thread(_kill_all_but, self._groups(owner), running.init_pid)

    def kill(self, owner: str) -> None:
        """Kill everything in a container at once, init included; :meth:`stop` must follow.

        However often something in there has forked, and whatever it ignores.
        """
        kill_group(self._groups(owner).unified)

    def kill_execs(self) -> None:
        """Kill at once what was asked to run, for an agent about to end; containers stay."""
        for owner in self._running:
            for group in self._groups(owner).exec_groups():
                kill_group(group)

    # Pieces --------------------------------------------------------------------------------

    def _prepare(self, spec: ContainerSpec) -> None:
        label = apparmor.profile_name(self.instance)
        if label is not None:
            apparmor.ensure_loaded(label)
        self.disks.attach(spec.owner, spec.limits.disk_size_mb, spec.saved_disk)
        if spec.saved_disk is not None and self.layer(spec.owner).is_dir():
            self.runtime.renew(spec.policy, spec.image_tree, self.layer(spec.owner))
        if spec.provide is not None:
            upper = self.layer(spec.owner)
            upper.mkdir(mode=0o755)
            spec.provide(upper)

    def _start_message(self, spec: ContainerSpec, slot: Slot) -> dict[str, object]:
        name = self.name_of(spec.owner)
        mounts = self.roots / name
        spec.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        label = apparmor.profile_name(self.instance)
        config = ContainerConfig(
            name=name,
            hostname=HOSTNAME,
            root=mounts / "merged",
            id_base=slot.id_base,
            netns=slot.netns,
            limits=spec.limits,
            seccomp=profile_in(RunDir.of(self.instance).root),
            apparmor=label and apparmor.start_profile(label),
            log=spec.directory / "lxc.log",
        )
        rootfs = {
            "mounts": str(mounts),
            "image_tree": str(spec.image_tree),
            "runtime_tree": str(self.runtime.tree(spec.policy, spec.image_tree)),
            "writable": str(self.disks.path(spec.owner)),
            "sysfs": str(slot.sysfs) if slot.sysfs is not None else None,
            "id_base": slot.id_base,
        }
        items = config.items(cgroup_layout())
        return {"name": name, "log": str(config.log), "rootfs": rootfs, "config": items}

    def _take_up(self, running: Running) -> None:
        self._running[running.owner] = running
        monitor = _parent_of(running.init_pid)
        pidfd = _pidfd(monitor) if monitor is not None else None
        if pidfd is None:
            self._clear_away(running)
            return
        self._monitors[running.owner] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._on_monitor_end, running)

    def _on_monitor_end(self, running: Running) -> None:
        # An ended monitor stays readable for ever.
        asyncio.get_running_loop().remove_reader(self._monitors[running.owner])
        self._clear_away(running)

    def _forget(self, owner: str) -> None:
        self._running.pop(owner, None)
        self._held.discard(owner)
        pidfd = self._monitors.pop(owner, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    async def _ended(self, running: Running) -> None:
        """A container ended by itself: take it apart and tell."""
        async with self._locks.holding(running.owner):
            if self._running.get(running.owner) is not running:
                return
            self._forget(running.owner)
            await self._dismantle(running.owner)
        # The disk stays until whoever owned the container stops it: it may be captured.
        for tell in self.on_exit:
            with log_errors(f"the end of {running.name} could not be told"):
                await tell(running.owner)

    def _clear_away(self, running: Running) -> None:
        what = f"{running.name} has ended and could not be cleared away"
        task = in_background(self._ended(running), what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dismantle(self, owner: str) -> None:
        name = self.name_of(owner)
        await asyncio.to_thread(dismantle, self._groups(owner), self.roots / name)
        await asyncio.to_thread(self.pool.release, owner)
        await self.launchers.forget(name)

    def _groups(self, owner: str) -> ContainerGroups:
        return cgroup_layout().container(self.name_of(owner))

    def name_of(self, owner: str) -> str:
        """The name of an owner's container and control groups."""
        return f"{self.instance.prefix}{owner}"


def dismantle(groups: ContainerGroups, mounts: Path) -> None:
    """Kill whatever runs in a container, remove its control groups, unmount its root; idempotent.

    Blocks for some seconds, and for as long as they take to die.  Raises HostFault when processes
    or mounts will not go.
    """
    monitors = pids_in(groups.monitor)
    kill_group(groups.unified)
    for pid in monitors:
        if not _wait_for(pid, _MONITOR_GRACE_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            _wait_for(pid, _MONITOR_GRACE_SECONDS)
    if not groups.remove(scaled(_BUSY_GROUPS_SECONDS)):
        _log.warning(
            "control groups of %s are still busy; the next start removes them", groups.name
        )
    try:
        unmount_rootfs(mounts)
    except OSError as error:
        raise HostFault(f"{error.filename} cannot be unmounted: {error.strerror}.") from error


def _kill_all_but(groups: ContainerGroups, init_pid: int) -> None:
    """Kill everything but init, frozen so that nothing can fork away from it."""
    keep = frozenset({init_pid})
    if not set(pids_below(groups.unified)) - keep:
        return
    freeze_group(groups.unified, frozen=True)
    try:
        signal_group(groups.unified, signal.SIGKILL, keep)
    finally:
        freeze_group(groups.unified, frozen=False)
    patience = Patience(_STRAYS_GRACE_SECONDS, lambda: set(pids_below(groups.unified)) - keep)
    while set(pids_below(groups.unified)) - keep and not patience.exhausted():
        signal_group(groups.unified, signal.SIGKILL, keep)
        time.sleep(0.005)


def _wait_for(pid: int, seconds: float) -> bool:
    """Wait for a process that is not our child; False if it does nothing and does not end."""
    pidfd = _pidfd(pid)
    if pidfd is None:
        return True
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        patience = Patience(seconds, lambda: [pid])
        while not patience.exhausted():
            if poller.poll(patience.poll_interval * 1000):
                return True
        return False
    finally:
        os.close(pidfd)


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _parent_of(pid: int) -> int | None:
    """The parent of a process (ppid in proc(5)): LXC's monitor, for a container's init."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1])
