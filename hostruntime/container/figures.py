"""The texts that tell programs in a container its own size and use, where the kernel's tell the
machine's: ``/proc/cpuinfo``, ``meminfo``, ``stat`` and ``loadavg`` (proc(5)), and
``/sys/devices/system/cpu/online``.

Formats are the kernel's, with the fields that programs read.  Nothing here reads or writes a file;
:mod:`hostruntime.container.figure_files` does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Where each file is mounted.
TARGETS = {
    "cpuinfo": "proc/cpuinfo",
    "loadavg": "proc/loadavg",
    "meminfo": "proc/meminfo",
    "stat": "proc/stat",
    "online": "sys/devices/system/cpu/online",
}
# The time constants of the three loads (proc(5)).
_LOAD_SECONDS = (60.0, 300.0, 900.0)
NO_LOAD = (0.0, 0.0, 0.0)
# What /proc/stat counts in (sysconf(3)), in microseconds.
TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
# What v1's memory.stat calls otherwise (memcg-v1.rst, cgroup-v2.rst).
_V1_NAMES = {
    "anon": "total_rss",
    "file": "total_cache",
    "shmem": "total_shmem",
    "file_mapped": "total_mapped_file",
    "file_dirty": "total_dirty",
    "file_writeback": "total_writeback",
    **{
        name: f"total_{name}"
        for name in ("active_anon", "inactive_anon", "active_file", "inactive_file", "unevictable")
    },
}
# proc_meminfo(5): its name, and the keys of memory.stat that add up to it.
_MEMORY = {
    "Active": ("active_anon", "active_file"),
    "Inactive": ("inactive_anon", "inactive_file"),
    "Active(anon)": ("active_anon",),
    "Inactive(anon)": ("inactive_anon",),
    "Active(file)": ("active_file",),
    "Inactive(file)": ("inactive_file",),
    "Unevictable": ("unevictable",),
    "Mlocked": (),
    "SwapTotal": (),
    "SwapFree": (),
    "Dirty": ("file_dirty",),
    "Writeback": ("file_writeback",),
    "AnonPages": ("anon",),
    "Mapped": ("file_mapped",),
    "Shmem": ("shmem",),
    "KReclaimable": ("slab_reclaimable",),
    "Slab": ("slab_reclaimable", "slab_unreclaimable"),
    "SReclaimable": ("slab_reclaimable",),
    "SUnreclaim": ("slab_unreclaimable",),
    "KernelStack": ("kernel_stack",),
    "PageTables": ("pagetables",),
}
# What the kernel would give up first (si_mem_available).
_RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")


def cpus_of(cpu: float) -> int:
    """The number of CPUs that a limit of so many is told to be: at least one, at most all."""
    return min(max(math.ceil(round(cpu, 3)), 1), os.cpu_count() or 1)


def online(cpus: int) -> str:
    """``/sys/devices/system/cpu/online``, a list of ranges (cputopology.rst)."""
    return "0\n" if cpus == 1 else f"0-{cpus - 1}\n"


def cpuinfo(host: str, cpus: int) -> str:
    """The machine's ``/proc/cpuinfo`` with its first CPUs only."""
    blocks = [block for block in host.split("\n\n") if block.startswith("processor")]
    return "".join(f"{block.rstrip()}\n\n" for block in blocks[:cpus])


def meminfo(total: int, used: int, stat: Mapping[str, int]) -> str:
    """``/proc/meminfo`` from bytes; ``stat`` is the container's memory.stat, of either version."""

    def amount(*names: str) -> int:
        # v1 has some of these names as well, for the group without those below it.
        return sum(stat.get(_V1_NAMES.get(name, ""), stat.get(name, 0)) for name in names)

    free = max(total - used, 0)
    values = {
        "MemTotal": total,
        "MemFree": free,
        "MemAvailable": min(free + amount(*_RECLAIMABLE), total),
        "Buffers": 0,
        "Cached": amount("file"),
        "SwapCached": 0,
        **{name: amount(*keys) for name, keys in _MEMORY.items()},
        "CommitLimit": total,
        "Committed_AS": amount("anon", "shmem"),
    }
    return "".join(f"{name + ':':<16}{value // 1024:>8} kB\n" for name, value in values.items())


def loadavg(loads: Sequence[float], wanted: float, tasks: int) -> str:
    """``/proc/loadavg``: the loads, what runs of how many, and in place of the last pid a number.

    ``wanted`` is the number of CPUs that the container's processes would use now.
    """
    running = min(max(math.ceil(wanted), 1), max(tasks, 1))
    return f"{' '.join(f'{load:.2f}' for load in loads)} {running}/{tasks} {tasks}\n"


def decayed(loads: Sequence[float], wanted: float, seconds: float) -> tuple[float, float, float]:
    """The loads after so many seconds in which ``wanted`` CPUs were wanted (loadavg.c)."""
    kept = [math.exp(-seconds / constant) for constant in _LOAD_SECONDS]
    one, five, fifteen = (
        load * share + wanted * (1 - share) for load, share in zip(loads, kept, strict=True)
    )
    return one, five, fifteen


@dataclass(frozen=True)
class CpuTimes:
    """What all CPUs of a container have done since it began, in microseconds."""

    user: int = 0
    system: int = 0
    idle: int = 0


def stat(times: CpuTimes, cpus: int, booted_at: int, tasks: int) -> str:
    """``/proc/stat``; ``booted_at`` is the machine's, in Unix seconds.

    ps(1) tells by it when a process began, whose own start is counted from the machine's as well.
    """
    all_of_them = [time // TICK_US for time in (times.user, times.system, times.idle)]
    lines = [_cpu_line("cpu ", all_of_them)]
    lines += [_cpu_line(f"cpu{n}", [time // cpus for time in all_of_them]) for n in range(cpus)]
    return "".join(
        (
            *lines,
            f"intr 0\nctxt 0\nbtime {booted_at}\nprocesses {tasks}\n",
            "procs_running 1\nprocs_blocked 0\nsoftirq 0 0 0 0 0 0 0 0 0 0 0\n",
        )
    )


def _cpu_line(name: str, ticks: Sequence[int]) -> str:
    user, system, idle = ticks
    return f"{name} {user} 0 {system} {idle} 0 0 0 0 0 0\n"


def idle_of(text: str) -> int:
    """The idle time of a ``/proc/stat`` of ours, in microseconds; 0 if it is none."""
    fields = text.partition("\n")[0].split()
    return int(fields[4]) * TICK_US if fields[:1] == ["cpu"] and len(fields) > 4 else 0


def loads_of(text: str) -> tuple[float, float, float]:
    """The loads of a ``/proc/loadavg`` of ours; none if it is none."""
    try:
        one, five, fifteen = (float(field) for field in text.split()[:3])
    except ValueError:
        return NO_LOAD
    return one, five, fifteen


def variables(cpu: float) -> dict[str, str]:
    """The environment for programs that ask the scheduler, which tells of the machine's CPUs.

    sched_getaffinity(2) could say less only by keeping a container on some CPUs while others are
    idle.  The first is nproc(1)'s, OpenMP's and that of the usual libraries for linear algebra, the
    second Go's, the last that of Python 3.13's os.process_cpu_count().
    """
    return dict.fromkeys(("OMP_NUM_THREADS", "GOMAXPROCS", "PYTHON_CPU_COUNT"), str(cpus_of(cpu)))
