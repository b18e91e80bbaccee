"""What can be struck, where it is found, and what may break with it.

``breaks`` of a process are the promises that its death may cost a client, each in words and at
once: ``connections`` (what is under way with the web process), ``calls`` (a 503 that says when to
try again), ``commands`` (those that run end), ``builds`` (those that run fail as `host_lost`),
``sandbox`` (the one it belongs to ends). Whatever is not named must go on as if nothing had been.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.faults.installation import Installation
from tests.processes import command_lines, launcher_pids

# A build's container has ended before its image is made.
IMAGE_MAKING = ("capture", "scrub", "publish")
EVERYTHING = frozenset({"connections", "calls", "commands", "builds"})

type Find = Callable[[Installation, list[str]], list[int]]


@dataclass(frozen=True)
class Process:
    """One kind of process. ``find`` gives the pids, given the owners of the moment's containers.

    ``hangs`` says whether one that is stopped (SIGSTOP) must be noticed and replaced. ``why_not``
    is the reason for which it is not. ``comes_back`` is False for what ends with its sandbox, and
    is not there at the moments that ``absent`` names.
    """

    name: str
    find: Find
    breaks: frozenset[str] = frozenset()
    hangs: bool = False
    why_not: str = ""
    comes_back: bool = True
    absent: Collection[str] = ()

    @property
    def signals(self) -> tuple[signal.Signals, ...]:
        """What it is struck with."""
        return (signal.SIGKILL, signal.SIGSTOP) if self.hangs else (signal.SIGKILL,)


def program(name: str) -> Find:
    """The main process of one of the process manager's programs."""
    return lambda installation, _: [installation.stack.pid(name)]


def children(pid: int) -> list[int]:
    """What a process has started and not collected (proc(5), task/…/children)."""
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def sentinel(installation: Installation, _: list[str]) -> list[int]:
    """The guard of the worker's group: which has one of its own, unlike the listener."""
    return [pid for pid in children(installation.stack.pid("worker")) if leads_a_group(pid)]


def leads_a_group(pid: int) -> bool:
    """Whether it is the first of a process group; one that has ended is not."""
    with suppress(ProcessLookupError):
        return os.getpgid(pid) == pid
    return False


def group(installation: Installation, subjects: list[str]) -> list[int]:
    """All that the guard has started: those that run tasks, what feeds them, what stores."""
    return [pid for one in sentinel(installation, subjects) for pid in children(one)]


def launchers(installation: Installation, _: list[str]) -> list[int]:
    """Both of the agent's launchers."""
    return launcher_pids(installation.stack.pid("agent"))


def monitored(installation: Installation, subjects: list[str]) -> dict[str, int]:
    """LXC's monitors of the moment's containers, by their owners."""
    found = {
        line.split()[-1].removeprefix(installation.instance.prefix): pid
        for pid, line in command_lines().items()
        if line.startswith("[lxc monitor]")
    }
    return {owner: found[owner] for owner in subjects if owner in found}


def monitors(installation: Installation, subjects: list[str]) -> list[int]:
    """The monitor of the first of the moment's containers that has one."""
    return list(monitored(installation, subjects).values())[:1]


def inits(installation: Installation, subjects: list[str]) -> list[int]:
    """The first process of one of the moment's containers."""
    return [pid for one in monitors(installation, subjects) for pid in children(one)[:1]]


def owners_of(installation: Installation, subjects: list[str], pids: list[int]) -> list[str]:
    """Whose monitor or first process is among these; others of the moment come and go meanwhile."""
    found = monitored(installation, subjects)
    return [one for one, pid in found.items() if {pid, *children(pid)} & set(pids)]


def squids(installation: Installation) -> tuple[list[int], list[int], list[int]]:
    """The proxy's master, what serves for it, and their helpers."""
    place = str(installation.run_dir.egress)
    lines = {pid: line for pid, line in command_lines().items() if place in line}
    proxies = [pid for pid, line in lines.items() if "squid.conf" in line]
    helpers = [pid for pid, line in lines.items() if "helper.pyz" in line]
    kids = [pid for pid in proxies if "--kid" in lines[pid]]
    return [pid for pid in proxies if pid not in kids], kids, helpers


def backend(installation: Installation, _: list[str]) -> list[int]:
    """The server process of one of the connections that web and worker have."""
    query = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'orkestr' "
        "AND usename = 'orkestr' ORDER BY backend_start LIMIT 1"
    )
    return [int(pid) for (pid,) in installation.rows(query)]


def manager(installation: Installation, _: list[str]) -> list[int]:
    """supervisord."""
    return [int((installation.stack.layout.run / "supervisord.pid").read_text())]


PROCESSES = (
    Process("web", program("web"), frozenset({"connections", "calls", "commands"}), hangs=True),
    Process("worker", program("worker"), hangs=True),
    Process("worker-sentinel", sentinel, why_not="the worker's own watchdog is what looks at it"),
    Process("worker-group", group, why_not="the sentinel is what looks at it"),
    Process("agent", program("agent"), frozenset({"calls", "commands", "builds"}), hangs=True),
    Process("launchers", launchers, frozenset({"calls", "commands", "builds"}), hangs=True),
    Process(
        "monitor",
        monitors,
        frozenset({"sandbox"}),
        why_not="nothing waits for a monitor that stands still",
        comes_back=False,
        absent=IMAGE_MAKING,
    ),
    Process(
        "init",
        inits,
        frozenset({"sandbox"}),
        why_not="a tenant may stop what is theirs",
        comes_back=False,
        absent=IMAGE_MAKING,
    ),
    Process("squid-master", lambda i, _: squids(i)[0], why_not="it serves nothing itself"),
    Process("squid-kid", lambda i, _: squids(i)[1], hangs=True),
    Process("egress-helpers", lambda i, _: squids(i)[2], hangs=True),
    Process("postgres", program("postgres"), frozenset({"calls"}), hangs=True),
    Process("postgres-backend", backend, frozenset({"calls"}), why_not="it is the postmaster's"),
    Process("manager", manager, EVERYTHING, hangs=True),
    Process(
        "up",
        lambda i, _: [i.stack.up_pid],
        EVERYTHING,
        why_not="it serves nothing, and systemd has no question to ask it",
    ),
)


def is_there(pid: int) -> bool:
    """Whether a process has not ended; one that only waits to be collected has (proc(5))."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in {"Z", "X"}


def strike(pids: Iterable[int], how: signal.Signals) -> list[int]:
    """Send a signal to each; those that were there."""
    struck = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, how)
            struck.append(pid)
    return struck
