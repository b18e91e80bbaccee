"""The files of :mod:`hostruntime.container.figures`: one set for each container, mounted over its
own in /proc and /sys, and written by the agent every two seconds.

They are plain files in memory.  lxcfs, which answers each read anew, was tried and given up: while
its process hangs, whoever reads can be neither frozen nor killed, so no sandbox could be paused or
deleted; when it dies, all running containers lose /proc/meminfo; and each read takes some 150 µs of
root's CPU time, more than the reader's own, which no container's limit counts.  Here a read costs
its container alone, and waits for nobody.  Figures can be two seconds old, and stay as they were
while no agent runs.

All are on one ramfs of the instance, which has neither a size nor a number of files to be told
(statfs(2)) and is never swapped, in a directory for each slot.  Nobody inside can write or lock out
the writer: the mount is read-only, root's files have no owner in there, and a lease (fcntl(2)) is
only for the owner.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from hostruntime.container import figures
from hostruntime.container.cgroups import ContainerGroups, flat_values
from hostruntime.container.figures import TARGETS
from hostruntime.container.limits import Limits
from hostruntime.host.tasks import log_errors

_MIB = 1024 * 1024
# Below this, all three loads are shown as none.
_LEAST_LOAD = 0.005


@dataclass(frozen=True)
class Counters:
    """What the kernel counts of a container: times in microseconds, memory in bytes."""

    used: int = 0
    user: int = 0
    system: int = 0
    throttled: int = 0
    stalled: int = 0

    @classmethod
    def read(cls, groups: ContainerGroups) -> Counters:
        """Raises FileNotFoundError when the container has ended."""
        times = flat_values(groups.unified / "cpu.stat")
        waited = (groups.throttled_us(times), groups.stalled_us())
        return cls(times["usage_usec"], times["user_usec"], times["system_usec"], *waited)

    def wanted_since(self, before: Counters) -> int:
        """The CPU time that processes used since, or would have used but for limit and neighbours.

        At least: of several that wait for a CPU of the machine's at once, one is known.
        """
        waited = max(self.throttled - before.throttled, self.stalled - before.stalled)
        return max(self.used - before.used + waited, 0)


@dataclass(frozen=True)
class _Shown:
    """One container's figures: its size, and the state that the next ones follow from."""

    directory: Path
    groups: ContainerGroups
    cpus: int
    memory: int
    at: float
    counters: Counters = field(default_factory=Counters)
    idle: int = 0
    loads: tuple[float, float, float] = figures.NO_LOAD
    spare: bool = False


@dataclass
class FigureFiles:
    """The figures of an instance's containers, by the index of their slots.

    ``directory`` is the mounted ramfs.  Every method blocks, though not for a disk, and can be
    called in any thread.
    """

    directory: Path
    _shown: dict[int, _Shown] = field(default_factory=dict)
    # What is in a directory is one container's, then another's.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, slot: int) -> Path:
        """The directory of a slot's container."""
        return self.directory / str(slot)

    def create(
        self, slot: int, limits: Limits, groups: ContainerGroups, *, spare: bool = False
    ) -> None:
        """Write the first figures of a container that is about to start.  Raises OSError."""
        shown = replace(self._begin(slot, limits, groups), spare=spare)
        with self._lock:
            shutil.rmtree(shown.directory, ignore_errors=True)
            shown.directory.mkdir()
            # LXC mounts the files as the container's root, whatever the umask is.
            shown.directory.chmod(0o755)
            texts = {
                "cpuinfo": figures.cpuinfo(_host_cpuinfo(), shown.cpus),
                "online": figures.online(shown.cpus),
                "meminfo": figures.meminfo(shown.memory, 0, {}),
                **_texts_of_cpu(shown, 0.0, 1),
            }
            for name, text in texts.items():
                _create(shown.directory / name, text)
            self._shown[slot] = shown

    def adopt(self, slot: int, limits: Limits, groups: ContainerGroups) -> None:
        """Continue with the figures of a container that outlived the previous agent, if it has any.

        Those of an earlier version have none.
        """
        shown = self._begin(slot, limits, groups)
        # Stale ones are no reason for an agent not to start.
        failed = log_errors(f"the figures of slot {slot} stay as they are")
        with self._lock, failed, contextlib.suppress(FileNotFoundError):
            idle = figures.idle_of((shown.directory / "stat").read_text())
            loads = figures.loads_of((shown.directory / "loadavg").read_text())
            counters = Counters.read(groups)
            self._shown[slot] = replace(shown, counters=counters, idle=idle, loads=loads)

    def remove(self, slot: int) -> None:
        """Remove those of a container that has exited; idempotent."""
        with self._lock:
            self._shown.pop(slot, None)
            directory = self.of(slot)
            for name in TARGETS:
                (directory / name).unlink(missing_ok=True)
            try:
                directory.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                # Another version has written files of other names.
                shutil.rmtree(directory, ignore_errors=True)

    def remove_left(self) -> None:
        """Remove what a killed agent has left, once all that still runs is adopted."""
        for path in self.directory.iterdir():
            with self._lock:
                if int(path.name) not in self._shown:
                    shutil.rmtree(path, ignore_errors=True)

    def refresh(self, cpu_us: Mapping[int, int]) -> None:
        """Bring the figures of all containers up to date.

        ``cpu_us`` has the CPU times of those that have just been read: one that has used none since
        the last time, and has no load any more, costs nothing.
        """
        for slot in list(self._shown):
            with log_errors(f"the figures of slot {slot} could not be written"):
                self._refresh(slot, cpu_us.get(slot))

    def _begin(self, slot: int, limits: Limits, groups: ContainerGroups) -> _Shown:
        cpus, memory = figures.cpus_of(limits.cpu), limits.memory_mb * _MIB
        return _Shown(self.of(slot), groups, cpus, memory, time.monotonic())

    def _refresh(self, slot: int, cpu_us: int | None) -> None:
        with self._lock, contextlib.suppress(FileNotFoundError):
            if (shown := self._shown.get(slot)) is None:
                return
            if cpu_us is None and shown.spare:
                # Nobody's yet, and frozen.
                self._shown[slot] = replace(shown, at=time.monotonic())
            else:
                self._shown[slot] = _refreshed(shown, cpu_us)


def _refreshed(shown: _Shown, cpu_us: int | None) -> _Shown:
    """Write what has changed, and return the new state.  Raises FileNotFoundError when it ends."""
    now = time.monotonic()
    seconds = max(now - shown.at, 0.001)
    # Whatever is done in there takes CPU time.
    active = (shown.groups.cpu_us() if cpu_us is None else cpu_us) != shown.counters.used
    if not active and max(shown.loads) < _LEAST_LOAD:
        return replace(shown, at=now)
    counters = Counters.read(shown.groups) if active else shown.counters
    tasks = shown.groups.tasks()
    used = counters.used - shown.counters.used
    wanted = min(counters.wanted_since(shown.counters) / 1e6 / seconds, tasks)
    # Only while something runs in there, which could look at it: nobody is to see the hour before.
    idle = max(round(shown.cpus * seconds * 1e6) - used, 0) if active else 0
    after = replace(
        shown,
        at=now,
        counters=counters,
        idle=shown.idle + idle,
        loads=figures.decayed(shown.loads, wanted, seconds),
    )
    if active:
        _write(shown.directory / "meminfo", _meminfo(shown))
    for name, text in _texts_of_cpu(after, wanted, tasks).items():
        if active or (name == "loadavg" and _rounded(after) != _rounded(shown)):
            _write(shown.directory / name, text)
    return after


def _meminfo(shown: _Shown) -> str:
    used = shown.groups.memory_bytes() or 0
    return figures.meminfo(shown.memory, used, shown.groups.memory_stat())


def _texts_of_cpu(shown: _Shown, wanted: float, tasks: int) -> dict[str, str]:
    times = figures.CpuTimes(shown.counters.user, shown.counters.system, shown.idle)
    booted_at = round(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME))
    return {
        "loadavg": figures.loadavg(shown.loads, wanted, tasks),
        "stat": figures.stat(times, shown.cpus, booted_at, tasks),
    }


def _rounded(shown: _Shown) -> list[float]:
    return [round(load, 2) for load in shown.loads]


def _create(path: Path, text: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o444)
    try:
        os.fchmod(descriptor, 0o444)
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    """Replace a file's content in place: what is mounted is this very file."""
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


@cache
def _host_cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()
