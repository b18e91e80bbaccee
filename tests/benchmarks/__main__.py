"""How long a sandbox takes to boot, and a first command to answer, over HTTP.

Two questions, each measured in one run on one installation, its contestants taking turns so that
whatever else the machine does falls on all alike:

- does a template 1 GB larger than its base boot as fast as the base?
- how long is create → first exec → answer, beside bubblewrap (where it is installed) entering a
  root of its own, the least any sandbox on this machine could take?
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from tests.clients.making import Templates
from tests.stack import Stack, running_stack

BASE = "debian-12"
GIGABYTE = 10**9
# Many small files, as packages are, not one large one.
BALLAST = (
    "mkdir /opt/ballast && cd /opt/ballast && "
    "head -c 1000000000 /dev/urandom | split -b 100000 -a 5 -"
)


@dataclass(frozen=True)
class Row:
    """One contestant's times in milliseconds."""

    name: str
    times: Sequence[float]

    def text(self, reference: float) -> str:
        """A line of the table; the ratio is of medians, to ``reference``."""
        median = statistics.median(self.times)
        p95 = statistics.quantiles(self.times, n=20)[-1] if len(self.times) > 1 else median
        return (
            f"{self.name:<44}{len(self.times):>5}{median:>10.1f}{p95:>10.1f}"
            f"{median / reference:>8.2f}"
        )


def print_table(title: str, rows: Sequence[Row]) -> None:
    """The first row is what the others are compared with."""
    reference = statistics.median(rows[0].times)
    head = f"{'':<44}{'n':>5}{'median ms':>10}{'p95 ms':>10}{'ratio':>8}"
    lines = [f"\n{title}", head, *(row.text(reference) for row in rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def milliseconds(action: Callable[[], object]) -> float:
    """How long ``action`` takes."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


class Bench:
    """The measured calls, on one connection to one installation."""

    def __init__(self, stack: Stack, client: httpx.Client) -> None:
        self._client = client
        self._tree = stack.layout.state_dir / "images" / BASE / "tree"

    def create(self, template: str) -> str:
        """A running sandbox's id."""
        answer = self._client.post("/v1/sandboxes", json={"template": template})
        answer.raise_for_status()
        return str(answer.json()["id"])

    def execute(self, sandbox: str) -> None:
        """One command that does nothing."""
        answer = self._client.post(f"/v1/sandboxes/{sandbox}/exec", json={"command": "true"})
        assert answer.json()["exit_code"] == 0, answer.text

    def end(self, sandbox: str) -> None:
        """Terminate it."""
        self._client.delete(f"/v1/sandboxes/{sandbox}").raise_for_status()

    def boot_times(self, templates: Sequence[str], rounds: int) -> dict[str, list[float]]:
        """Create alone, the templates taking turns."""
        times: dict[str, list[float]] = {template: [] for template in templates}
        for _ in range(rounds):
            for template in templates:
                began = time.perf_counter()
                sandbox = self.create(template)
                times[template].append((time.perf_counter() - began) * 1000)
                self.end(sandbox)
        return times

    def first_answer(self) -> float:
        """Create, then exec, in milliseconds."""
        began = time.perf_counter()
        sandbox = self.create(BASE)
        self.execute(sandbox)
        elapsed = (time.perf_counter() - began) * 1000
        self.end(sandbox)
        return elapsed

    def another_answer(self, sandbox: str) -> float:
        """One exec in a sandbox that runs already."""
        return milliseconds(lambda: self.execute(sandbox))

    def bubblewrap(self) -> float:
        """The same command by bwrap(1) in the same tree: no HTTP, no database, no limits."""
        isolate = ["bwrap", "--ro-bind", str(self._tree), "/", "--unshare-all", "--proc", "/proc"]
        command = [*isolate, "--dev", "/dev", "/bin/true"]
        return milliseconds(lambda: subprocess.run(command, check=True, stdin=subprocess.DEVNULL))


def measure(stack: Stack, rounds: int) -> None:
    """Both questions, one after the other."""
    with stack.client() as client:
        bench, templates = Bench(stack, client), Templates(client)
        try:
            large = templates.ready(BASE, BALLAST)
            grown = templates.get(large).get("size_bytes") or 0
            # The first boots fill caches that every later one profits from.
            bench.boot_times([BASE, large], 3)
            boots = bench.boot_times([BASE, large], rounds)
            print_table(
                "Boot (POST /v1/sandboxes until it is running)",
                [
                    Row(BASE, boots[BASE]),
                    Row(f"{BASE} and 1 GB more ({grown / GIGABYTE:.2f} GB)", boots[large]),
                ],
            )
            measure_answers(bench, rounds)
        finally:
            templates.delete_all()


def measure_answers(bench: Bench, rounds: int) -> None:
    """Create → first exec, a later exec, and the peer, taking turns."""
    kept = bench.create(BASE)
    contestants: dict[str, Callable[[], float]] = {
        "create and first exec": bench.first_answer,
        "exec in a running sandbox": lambda: bench.another_answer(kept),
    }
    if shutil.which("bwrap"):
        contestants["bwrap /bin/true, no server around it"] = bench.bubblewrap
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant())
    bench.end(kept)
    rows = [Row(name, values) for name, values in times.items()]
    print_table("First answer over HTTP on loopback", rows)


def main(argv: Sequence[str]) -> int:
    """Start an installation, measure, remove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (default 40)")
    options = parser.parse_args(argv)
    with running_stack() as stack:
        measure(stack, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
