"""What a fleet of sandboxes costs, and what grows with it: 10, 100, 300, 1,000 idle ones at once.

At each size: create, delete, exec and the list of sandboxes over the agent's socket, the memory
that each sandbox takes from the machine (MemAvailable, proc_meminfo(5)) and in its own processes
(PSS, proc_pid_smaps(5)), and the processor time of the agent and its launchers while nothing
happens.  At the largest size, also how long a killed agent takes to serve again, and a teardown.
Nothing is asserted.  Run it as root: ``nice -n 10 python -m tests.benchmarks.fleet``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hostruntime.container.cgroups import pids_under
from hostruntime.host.run import run
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import REPO, Agent, instance_groups
from tests.host.small import IMAGE, a_small_agent

SIZES = (10, 100, 300, 1000)
AT_ONCE = 4
SAMPLES = 10
IDLE_SECONDS = 10.0
# Each tick is a hundredth of a second, as everywhere (USER_HZ, time(7)).
_TICKS = os.sysconf("SC_CLK_TCK")
_HEAD = (
    "| sandboxes | CPU ms of a create | create ms | exec ms | delete ms | list ms | idle CPU % "
    "| per sandbox: CPU % | MemAvailable MB | PSS of its processes MB |\n" + "|---:" * 10 + "|"
)


def main(argv: Sequence[str]) -> int:
    """Measure one network mode at each size."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fleet", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--network", choices=["off", "restricted", "open"], default="off")
    options = parser.parse_args(argv)
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp", prefix="fleet") as parent,
        a_small_agent(Path(parent) / "state") as agent,
    ):
        fleet = Fleet(agent, options.network)
        _say(f"network {options.network}\n\n{_HEAD}")
        for size in sorted(options.sizes):
            fleet.grow(size)
            fleet.measure()
        _say("")
        _timed("killed agent to its first answer", fleet.restart)
        _timed("list right after", agent.client.sandboxes)
        _timed("one command right after", lambda: fleet.execute(0))
        _timed("start of a confined program, as the web process is", _confine)
        _timed("graceful stop", agent.stop)
        _timed("teardown", lambda: _say(agent.tear_down().rstrip()))
    return 0


@dataclass
class Fleet:
    """Sandboxes on one agent, numbered from 0."""

    agent: Agent
    network: str
    count: int = 0
    spare: int = 0
    memory_before: int = field(default_factory=lambda: _available())

    def grow(self, size: int) -> None:
        """Create more until there are ``size``."""
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self.create, range(self.count, size)))
        seconds, made = time.monotonic() - began, size - self.count
        _log(
            f"{made} created, {AT_ONCE} at once, in {seconds:.1f} s: {made / seconds:.1f} a second"
        )
        self.count = size

    def create(self, number: int) -> None:
        """One small sandbox."""
        name = f"sbx_fleet{number}"
        wish = CreateSandbox(name, image=IMAGE, cpu=0.1, memory_mb=64, network=self.network)
        self.agent.client.create_sandbox(wish)

    def execute(self, number: int) -> None:
        """One command that does nothing."""
        command = Exec(["/usr/bin/python3", "-V"])
        assert self.agent.client.exec(f"sbx_fleet{number}", command).code == 0

    def measure(self) -> None:
        """One line of the table."""
        # The recycler of network slots, and what the kernel frees late.
        time.sleep(5)
        memory = (self.memory_before - _available()) / self.count / 1e6
        cpu, pss = self._idle_percent(), self._pss() / self.count / 1e6
        base = 1_000_000 + self.spare
        self.spare += SAMPLES
        names, client = range(base, base + SAMPLES), self.agent.client
        busy = self._host_seconds()
        created = [_milliseconds(partial(self.create, name)) for name in names]
        busy = (self._host_seconds() - busy) * 1000 / SAMPLES
        executed = [_milliseconds(partial(self.execute, number)) for number in range(SAMPLES)]
        deleted = [
            _milliseconds(partial(client.delete_sandbox, f"sbx_fleet{name}")) for name in names
        ]
        listed = [_milliseconds(client.sandboxes) for _ in range(SAMPLES)]
        times = " | ".join(
            f"{statistics.median(values):.1f}" for values in (created, executed, deleted, listed)
        )
        idle = f"{cpu:.2f} | {cpu / self.count:.4f} | {memory:.2f} | {pss:.2f}"
        _say(f"| {self.count} | {busy:.0f} | {times} | {idle} |")

    def restart(self) -> None:
        """Kill the agent and start another."""
        self.agent.kill()
        self.agent.start()

    def _host_seconds(self) -> float:
        """What the agent and its launchers have used, their children that have exited included."""
        return _cpu_seconds([self.agent.pid, *self.agent.children()], children=True)

    def _idle_percent(self) -> float:
        pids = [self.agent.pid, *self.agent.children(), *self._pids()]
        before, began = _cpu_seconds(pids), time.monotonic()
        time.sleep(IDLE_SECONDS)
        return 100 * (_cpu_seconds(pids) - before) / (time.monotonic() - began)

    def _pss(self) -> int:
        return sum(_pss_bytes(pid) for pid in self._pids())

    def _pids(self) -> set[int]:
        """The processes of all sandboxes: their own, and LXC's monitors."""
        groups = instance_groups(self.agent.prefix.rstrip("-"))
        return {pid for group in groups for pid in pids_under(group)}


def _confine() -> None:
    """In a mount namespace of its own, from which all sandboxes' mounts are detached."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as closed:
        need = Path(closed) / "need"
        need.mkdir()
        confine = [sys.executable, "-m", "orkestr_console.runner.confine", "--user", "nobody"]
        run([*confine, "--need", str(need), "--", "/bin/true"], timeout=600, cwd=REPO)


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def _cpu_seconds(pids: Iterable[int], *, children: bool = False) -> float:
    ticks = 0
    for pid in pids:
        # utime, stime, and those of the children that were waited for (proc_pid_stat(5)).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11 : 15 if children else 13]))
    return ticks / _TICKS


def _milliseconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def _timed(what: str, action: Callable[[], object]) -> None:
    _say(f"{what}: {_milliseconds(action) / 1000:.2f} s")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _log(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
