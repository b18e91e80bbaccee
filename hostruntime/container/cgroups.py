"""A container's resource limits, and the control groups that enforce them.

Three layouts exist (cgroups(7)): *v2* alone on ``/sys/fs/cgroup``; *hybrid*, where the resource
controllers are v1 hierarchies and a unified one without controllers is on
``/sys/fs/cgroup/unified``; and *v1* alone, which this runtime refuses, because only the unified
hierarchy can kill a process tree that forks as it is being killed (``cgroup.kill``, Linux 5.14).

The groups of instance 0 are below ``ork0``: a container's group has its name, its LXC monitor's has
the prefix ``mon-``.  There is one of each in every hierarchy that limits something
(:meth:`CgroupLayout.unused`), and a child of the container's for each command in the unified one.
Where systemd owns a v2 hierarchy, ``ork0`` is a unit that systemd has delegated
(:mod:`hostruntime.container.delegation`): ``orkestr.slice/ork0.service``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from hostruntime.errors import HostUnavailable

if TYPE_CHECKING:
    # Not for the launcher, which is forked for each command: what is imported, pydantic above all,
    # makes each fork slower.
    from hostruntime.container.limits import Limits

CGROUPS = Path("/sys/fs/cgroup")
SYSTEMD = Path("/run/systemd/system")
SLICE = "orkestr.slice"
CONTROLLERS = ("cpu", "memory", "pids")
MONITOR_PREFIX = "mon-"
_CPU_PERIOD_US = 100_000
# What every group has unless told otherwise.
_CPU_WEIGHT, _CPU_SHARES = 100, 1024
# Flat keyed files (cgroup-v2.rst) and a process's status are at most a page, and read in one piece.
_SMALL_FILE_BYTES = 4096
_V1_CONTROLLERS = ("memory", "pids", "cpu")
_MIB = 1024 * 1024
# cgroup v1's limit for socket buffers of all IP protocols, despite its name.
_SOCKET_BUFFERS = "memory.kmem.tcp.limit_in_bytes"
_SOCKET_BUFFERS_DIVISOR, _MIN_SOCKET_BUFFERS = 4, 16 * _MIB


@dataclass(frozen=True)
class CgroupLayout:
    """Where this machine's hierarchies are; ``v1`` maps a v1 controller to its mount point.

    ``delegated`` means that systemd owns the hierarchy, and groups may only be created in units.
    """

    kind: str
    unified: Path
    v1: Mapping[str, Path]
    hierarchies: tuple[Path, ...]
    delegated: bool = False

    def instance_group(self, name: str) -> str:
        """The parent of all groups of an instance, from any of its names or its prefix."""
        instance = name.partition("-")[0]
        return f"{SLICE}/{instance}.service" if self.delegated else instance

    def lxc_items(self, limits: Limits, name: str) -> list[tuple[str, str]]:
        """The LXC configuration (lxc.container.conf(5)) of a container's groups and limits."""
        group = self.instance_group(name)
        items = [
            ("lxc.cgroup.dir.container", f"{group}/{name}"),
            ("lxc.cgroup.dir.monitor", f"{group}/{MONITOR_PREFIX}{name}"),
            ("lxc.cgroup.dir.monitor.pivot", f"{group}/pivot"),
        ]
        v2 = self.kind == "v2"
        return items + (self._v2_settings(limits, group) if v2 else self._v1_settings(limits))

    def _v2_settings(self, limits: Limits, group: str) -> list[tuple[str, str]]:
        quota = round(limits.cpu * _CPU_PERIOD_US)
        items = [
            ("lxc.cgroup2.memory.max", str(limits.memory_mb * _MIB)),
            ("lxc.cgroup2.pids.max", str(limits.pids)),
            ("lxc.cgroup2.cpu.max", f"{quota} {_CPU_PERIOD_US}"),
        ]
        # Even if there is no swap now: it may be added while the container runs.
        if (self.unified / group / "memory.swap.max").exists() or _has_swap():
            items.append(("lxc.cgroup2.memory.swap.max", "0"))
        return items

    def _v1_settings(self, limits: Limits) -> list[tuple[str, str]]:
        memory = str(limits.memory_mb * _MIB)
        quota = round(limits.cpu * _CPU_PERIOD_US)
        items = [
            ("lxc.cgroup.memory.limit_in_bytes", memory),
            ("lxc.cgroup.pids.max", str(limits.pids)),
            ("lxc.cgroup.cpu.cfs_period_us", str(_CPU_PERIOD_US)),
            ("lxc.cgroup.cpu.cfs_quota_us", str(quota)),
        ]
        if (self.v1["memory"] / "memory.memsw.limit_in_bytes").exists():
            items.append(("lxc.cgroup.memory.memsw.limit_in_bytes", memory))
        # In v1, network buffers do not count as a container's memory, and are not accounted at all
        # without a limit (mem_cgroup_sk_alloc in the kernel's memcontrol).  A stream may exceed the
        # limit by its last segment, so that it never stalls permanently.
        if (self.v1["memory"] / _SOCKET_BUFFERS).exists():
            buffers = max(limits.memory_mb * _MIB // _SOCKET_BUFFERS_DIVISOR, _MIN_SOCKET_BUFFERS)
            items.append((f"lxc.cgroup.{_SOCKET_BUFFERS}", str(buffers)))
        return items

    def unused(self) -> list[Path]:
        """The hierarchies whose controllers limit no container, such as blkio's of v1.

        That of systemd itself is left to it (name=systemd in cgroups(7)).
        """
        used = {self.unified, *(path.resolve() for path in self.v1.values()), CGROUPS / "systemd"}
        return [path for path in self.hierarchies if path not in used]

    def container(self, name: str) -> ContainerGroups:
        """The groups of one container, whether they exist or not."""
        return ContainerGroups(self, name)

    def pids_group(self, name: str) -> Path:
        """The group where all processes of an instance's containers are counted (pids.max)."""
        hierarchy = self.unified if self.kind == "v2" else self.v1["pids"]
        return hierarchy / self.instance_group(name)

    def container_names(self, prefix: str) -> list[str]:
        """Every container with this name prefix that has a group, or whose monitor has one."""
        names: set[str] = set()
        for hierarchy in self.hierarchies:
            for entry in _entries(hierarchy / self.instance_group(prefix)):
                name = entry.name.removeprefix(MONITOR_PREFIX)
                if name.startswith(prefix):
                    names.add(name)
        return sorted(names)

    def remove_instance(self, prefix: str) -> None:
        """Remove the remaining groups of an instance once none of its containers runs."""
        for hierarchy in self.hierarchies:
            _remove_tree(hierarchy / self.instance_group(prefix))


@cache
def cgroup_layout() -> CgroupLayout:
    """This machine's layout; raises HostUnavailable when the runtime cannot work with it."""
    if (CGROUPS / "cgroup.controllers").exists():
        return CgroupLayout("v2", CGROUPS, {}, (CGROUPS,), delegated=SYSTEMD.is_dir())
    unified = CGROUPS / "unified"
    if not (unified / "cgroup.controllers").exists():
        raise HostUnavailable(
            "This machine mounts no cgroup v2 hierarchy. Boot with systemd.unified_cgroup_hierarchy"
            "=1, or mount one: mkdir /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 "
            "/sys/fs/cgroup/unified"
        )
    v1 = {name: CGROUPS / name for name in _V1_CONTROLLERS}
    if missing := [name for name, path in v1.items() if not path.is_dir()]:
        raise HostUnavailable(
            f"The cgroup v1 controller {missing[0]} is not mounted under {CGROUPS}; mount it, or "
            "boot with systemd.unified_cgroup_hierarchy=1."
        )
    others = (path for path in CGROUPS.iterdir() if path.is_dir() and not path.is_symlink())
    return CgroupLayout("hybrid", unified, v1, tuple(sorted(others)))


@dataclass(frozen=True)
class CounterFiles:
    """The files of a container's counters, for who reads those of all containers all the time.

    They are paths as text: joining them takes longer than reading the files.
    """

    cpu: str
    memory: str

    def read(self) -> tuple[int, int] | None:
        """The CPU time used so far in microseconds, and the memory in bytes; None if gone."""
        try:
            memory = int(_read_at_once(self.memory))
            stat = _read_at_once(self.cpu)
        except OSError:
            return None
        # Its first line, usage_usec (Documentation/admin-guide/cgroup-v2.rst).
        return int(stat.split(maxsplit=2)[1]), memory


@dataclass(frozen=True)
class ContainerGroups:
    """One container's control groups, by name."""

    layout: CgroupLayout
    name: str

    @cached_property
    def unified(self) -> Path:
        """The container's group in the unified hierarchy; commands get children of it."""
        return self.layout.unified / self.layout.instance_group(self.name) / self.name

    @property
    def monitor(self) -> Path:
        """The group of LXC's monitor process in the unified hierarchy."""
        return self.unified.with_name(f"{MONITOR_PREFIX}{self.name}")

    def exec_group(self, tag: str) -> Path:
        """The path of the group for one command."""
        return self.unified / f"exec-{tag}"

    def exec_groups(self) -> list[Path]:
        """The groups of commands that are running, or whose agent died before they exited."""
        return [path for path in _entries(self.unified) if path.name.startswith("exec-")]

    def memory_group(self) -> Path:
        """The group where memory is accounted."""
        if self.layout.kind == "v2":
            return self.unified
        return self.layout.v1["memory"] / self.layout.instance_group(self.name) / self.name

    def command_groups(self) -> list[Path]:
        """The container's group in every hierarchy, the unified hierarchy's last."""
        group = f"{self.layout.instance_group(self.name)}/{self.name}"
        others = (h for h in self.layout.hierarchies if h != self.layout.unified)
        return [*(h / group for h in others if (h / group).is_dir()), self.unified]

    def has_supervisors(self) -> bool:
        """Whether a process of the host's may write for the container: any but LXC's monitor.

        Such a process does not freeze with the container.
        """
        return len(pids_under(self.monitor)) != 1

    def monitor_groups(self) -> list[Path]:
        """The groups of LXC's monitor in every hierarchy that has one, the unified one's last."""
        group = f"{self.layout.instance_group(self.name)}/{MONITOR_PREFIX}{self.name}"
        others = (h for h in self.layout.hierarchies if h != self.layout.unified)
        return [*(h / group for h in others if (h / group).is_dir()), self.monitor]

    def background_group(self, command: str) -> Path:
        """The path of the group for one command that runs in the background."""
        return self.unified / f"background-{command}"

    def own_groups(self) -> list[Path]:
        """The groups of this process itself, in the order of :meth:`command_groups`."""
        own = _own_paths()
        hierarchies = [h for h in self.layout.hierarchies if h != self.layout.unified]
        group = f"{self.layout.instance_group(self.name)}/{self.name}"
        v1 = [h / own.get(_names_of(h.name), "") for h in hierarchies if (h / group).is_dir()]
        return [*v1, self.layout.unified / own[_names_of("")]]

    def set_cpu_share(self, share: float) -> None:
        """Have the container get this share of what another gets of a busy processor.

        cpu.weight in cgroup-v2.rst, cpu.shares in sched-design-CFS.rst.
        """
        if self.layout.kind == "v2":
            file, usual = self.unified / "cpu.weight", _CPU_WEIGHT
        else:
            group = f"{self.layout.instance_group(self.name)}/{self.name}"
            file, usual = self.layout.v1["cpu"] / group / "cpu.shares", _CPU_SHARES
        # The container may be gone, and is no worse off with what it has.
        with contextlib.suppress(OSError):
            _write_at_once(file, b"%d" % round(usual * share))

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for lack of memory."""
        file = "memory.events" if self.layout.kind == "v2" else "memory.oom_control"
        return _flat_value(self.memory_group() / file, "oom_kill")

    def cpu_us(self) -> int:
        """CPU time used so far in microseconds, including exited commands; 0 without the group.

        ``cpu.stat`` of the unified hierarchy reports it with or without the cpu controller
        (Documentation/admin-guide/cgroup-v2.rst), so it works for the hybrid layout as well.
        """
        return _flat_value(self.unified / "cpu.stat", "usage_usec")

    def memory_bytes(self) -> int | None:
        """The container's current memory, including page cache and tmpfs; None if gone."""
        v2 = self.layout.kind == "v2"
        file = self.memory_group() / ("memory.current" if v2 else "memory.usage_in_bytes")
        try:
            return int(_read_at_once(file))
        except OSError:
            return None

    def working_set_bytes(self) -> int | None:
        """The same without the page cache that the kernel would drop first; None if gone.

        ``inactive_file`` of memory.stat, with the children's (``total_…``) in the hybrid layout:
        the kernel adds it up when it is read, which is for whoever asks and not for every sample.
        """
        memory = self.memory_bytes()
        if memory is None:
            return None
        key = "inactive_file" if self.layout.kind == "v2" else "total_inactive_file"
        return max(memory - _flat_value(self.memory_group() / "memory.stat", key), 0)

    def counter_files(self) -> CounterFiles:
        """Where :meth:`cpu_us` and :meth:`memory_bytes` read."""
        memory = "memory.current" if self.layout.kind == "v2" else "memory.usage_in_bytes"
        return CounterFiles(str(self.unified / "cpu.stat"), str(self.memory_group() / memory))

    def init_pid(self) -> int | None:
        """The host pid of the container's init (pid 1 inside), if it is running."""
        return next((pid for pid in pids_under(self.unified) if pid_inside(pid) == 1), None)

    def remove(self, timeout: float = 2.0) -> bool:
        """Remove all groups of an exited container; False if some are still busy."""
        deadline = time.monotonic() + timeout
        while remaining := [path for path in self._all_paths() if not _remove_tree(path)]:
            if time.monotonic() > deadline:
                return not remaining
            time.sleep(0.005)
        return True

    def _all_paths(self) -> list[str]:
        # As text: there are up to two dozen for each container that ends.
        group = self.layout.instance_group(self.name)
        return [
            f"{hierarchy}/{group}/{name}"
            for hierarchy in self.layout.hierarchies
            for name in (self.name, f"{MONITOR_PREFIX}{self.name}")
        ]


def _own_paths(file: Path = Path("/proc/self/cgroup")) -> dict[frozenset[str], str]:
    """This process's group in each hierarchy, by the names that it is mounted on (cgroups(7)).

    A v1 hierarchy is mounted on the names of its controllers, or on its own; the unified one has
    none.
    """
    paths = {}
    for line in file.read_text().splitlines():
        _, names, path = line.split(":", 2)
        paths[_names_of(names.removeprefix("name="))] = path.lstrip("/")
    return paths


def _names_of(text: str) -> frozenset[str]:
    """Controllers that share a hierarchy, whose order is anybody's."""
    return frozenset(text.split(","))


def _has_swap() -> bool:
    return Path("/proc/swaps").read_text().count("\n") > 1


def pids_in(group: Path) -> list[int]:
    """The pids in exactly this group (cgroup.procs), as the caller's pid namespace sees them."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split() if line != "0"]
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


def pids_under(group: Path) -> list[int]:
    """The pids in this group and in every group below it."""
    return [pid for path, _, _ in os.walk(group) for pid in pids_in(Path(path))]


def pid_inside(pid: int) -> int | None:
    """A process's pid in its own, innermost pid namespace (NSpid in proc(5))."""
    try:
        # In one piece, and not Path.read_text: it is read for each command.
        status = _read_at_once(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return None
    _, _, rest = status.partition("\nNSpid:")
    return int(rest.partition("\n")[0].split()[-1]) if rest else None


def signal_group(group: Path, number: signal.Signals, exclude: frozenset[int] = frozenset()) -> int:
    """Signal every process in and below a group except ``exclude``; return how many."""
    count = 0
    for pid in pids_under(group):
        if pid not in exclude:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
                count += 1
    return count


def kill_group(group: Path) -> None:
    """SIGKILL everything in and below a group of the unified hierarchy, including ongoing forks."""
    with contextlib.suppress(OSError):
        _write_at_once(group / "cgroup.kill", b"1")


def freeze_group(group: Path, frozen: bool) -> None:
    """Freeze or thaw a group of the unified hierarchy; a missing group is not an error."""
    with contextlib.suppress(OSError):
        _write_at_once(group / "cgroup.freeze", b"1" if frozen else b"0")


def is_frozen(group: Path) -> bool:
    """Whether every process in or below a group of the unified hierarchy is frozen."""
    return _flat_value(group / "cgroup.events", "frozen") > 0


def is_populated(group: Path) -> bool:
    """Whether any live process is in or below a group of the unified hierarchy."""
    return _flat_value(group / "cgroup.events", "populated") > 0


def move_survivors(group: Path, parent: Path) -> None:
    """Move the processes that outlive their command to the container's group, and remove its own.

    Mostly there are none, and nothing but a removal is needed.
    """
    for _ in range(20):
        if _try_to_remove(group):
            return
        for pid in pids_in(group):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                (parent / "cgroup.procs").write_text(str(pid))


def _try_to_remove(group: Path | str) -> bool:
    try:
        os.rmdir(group)  # noqa: PTH106 - for each command
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _flat_value(path: Path, key: str) -> int:
    try:
        lines = _read_at_once(path).splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)


def _read_at_once(path: str | Path) -> str:
    """Read a small file of the kernel's; a third of what Path.read_text takes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _SMALL_FILE_BYTES).decode(errors="replace")
    finally:
        os.close(descriptor)


def _write_at_once(path: Path, data: bytes) -> None:
    """Write to a file of the kernel's, which is there; a third of what Path.write_text takes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _entries(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove_tree(group: Path | str) -> bool:
    # Mostly there is nothing in it, or it is gone already.
    if _try_to_remove(group):
        return True
    for path, _, _ in os.walk(group, topdown=False):
        with contextlib.suppress(OSError):
            Path(path).rmdir()
    return not Path(group).exists()
