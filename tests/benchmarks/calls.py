"""What API calls take, alone and concurrently, beside isolated commands without a server.

All figures come from one run on one installation, with the contestants taking turns, so that
whatever else the machine does affects all of them.  Ratios are to the median of bwrap(1), where it
is installed.  Run it as root: ``python -m tests.benchmarks.calls``; ``--out`` writes a page.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import psycopg

from tests.benchmarks.peers import peers
from tests.stack import Stack, running_stack

BASE = "debian-12"
CLIENTS = (1, 8, 32)
RATE_SECONDS = 10.0
HEAD = "| | n | median ms | p95 ms | × bwrap |\n|---|---:|---:|---:|---:|"


@dataclass
class Report:
    """What is printed as it is measured, and written at the end."""

    lines: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Add some lines."""
        self.lines.append(text)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def row(self, name: str, times: Sequence[float], reference: float | None) -> None:
        """Add one contestant's times, given in milliseconds."""
        median = statistics.median(times)
        p95 = statistics.quantiles(times, n=20)[-1]
        ratio = f"{median / reference:.2f}" if reference else "–"
        self.say(f"| {name} | {len(times)} | {median:.1f} | {p95:.1f} | {ratio} |")


class Calls:
    """The calls that are measured, each by one client on one connection."""

    def __init__(self, stack: Stack) -> None:
        self._client = stack.client()
        self._anonymous = httpx.Client(base_url=stack.url, timeout=60, trust_env=False)
        self.sandbox = self.create()

    def create(self) -> str:
        """A running sandbox's id."""
        answer = self._client.post("/v1/sandboxes", json={"template": BASE, "network": "off"})
        return str(answer.raise_for_status().json()["id"])

    def execute(self, sandbox: str | None = None) -> None:
        """One command that does nothing."""
        path = f"/v1/sandboxes/{sandbox or self.sandbox}/exec"
        answer = self._client.post(path, json={"command": "true"})
        assert answer.json()["exit_code"] == 0, answer.text

    def end(self, sandbox: str | None = None) -> None:
        """Terminate one, or the client's own."""
        self._client.delete(f"/v1/sandboxes/{sandbox or self.sandbox}").raise_for_status()

    def read(self) -> None:
        """A sandbox's row."""
        self._client.get(f"/v1/sandboxes/{self.sandbox}").raise_for_status()

    def miss(self) -> None:
        """An address that there is not."""
        assert self._client.get("/v1/nothing").status_code == 404

    def redirect(self) -> None:
        """A page that wants to be signed in for."""
        assert self._anonymous.get("/templates/").status_code == 302

    def first_answer(self) -> str:
        """Create, and one command's answer."""
        sandbox = self.create()
        self.execute(sandbox)
        return sandbox

    def create_and_end(self) -> None:
        """One sandbox from its beginning to its end."""
        self.end(self.create())


def measure_alone(stack: Stack, report: Report, rounds: int) -> None:
    """Each call and each peer by itself, taking turns."""
    calls = Calls(stack)
    made: list[str] = []
    contestants: dict[str, Callable[[], object]] = {
        "a 404": calls.miss,
        "a redirect to the sign-in page": calls.redirect,
        "`GET /v1/sandboxes/{id}`": calls.read,
        "`exec true`": calls.execute,
        "create → first command's answer": lambda: made.append(calls.first_answer()),
        "delete": lambda: calls.end(made.pop()),
    }
    with peers(stack.layout.state_dir / "images" / BASE / "tree") as others:
        everybody = {**others, **contestants}
        times: dict[str, list[float]] = {name: [] for name in everybody}
        for number in range(-2, rounds):
            for name, contestant in everybody.items():
                began = time.perf_counter()
                contestant()
                # The first rounds fill caches that every later one profits from.
                if number >= 0:
                    times[name].append((time.perf_counter() - began) * 1000)
    calls.end()
    report.say(f"\n## One client\n\n{HEAD}")
    reference = statistics.median(times["bwrap"]) if "bwrap" in times else None
    for name, values in times.items():
        report.row(name, values, reference)


def measure_rates(stack: Stack, report: Report) -> None:
    """How many calls a second several clients get answered together."""
    report.say("\n## Several clients: answers a second\n")
    report.say(f"| | {' | '.join(f'{number} clients' for number in CLIENTS)} |")
    report.say(f"|---|{'---:|' * len(CLIENTS)}")
    kinds: dict[str, Callable[[Calls], object]] = {
        "`GET /v1/sandboxes/{id}`": Calls.read,
        "`exec true`": Calls.execute,
        "create and delete": Calls.create_and_end,
    }
    for name, call in kinds.items():
        rates = [rate(stack, call, number) for number in CLIENTS]
        report.say(f"| {name} | {' | '.join(f'{each:.1f}' for each in rates)} |")


def rate(stack: Stack, call: Callable[[Calls], object], clients: int) -> float:
    """Calls a second; each client has a sandbox and a connection of its own."""
    until = threading.Event()

    def work(calls: Calls) -> int:
        count = 0
        while not until.is_set():
            call(calls)
            count += 1
        return count

    everybody = [Calls(stack) for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        counts = [pool.submit(work, calls) for calls in everybody]
        time.sleep(RATE_SECONDS)
        until.set()
        total = sum(each.result() for each in counts)
        took = time.perf_counter() - began
    for calls in everybody:
        calls.end()
    return total / took


def measure_burst(stack: Stack, report: Report, number: int) -> None:
    """So many sandboxes at the same moment, until each has answered its first command."""
    everybody = [Calls(stack)]
    everybody[0].end()
    client = everybody[0]

    def one(_: int) -> tuple[str, float]:
        began = time.perf_counter()
        sandbox = client.first_answer()
        return sandbox, (time.perf_counter() - began) * 1000

    with ThreadPoolExecutor(number) as pool:
        began = time.perf_counter()
        done = list(pool.map(one, range(number)))
        took = time.perf_counter() - began
        list(pool.map(client.end, [sandbox for sandbox, _ in done]))
    report.say(
        f"\n## A burst: {number} creates at once, each to its first command's answer\n\n{HEAD}"
    )
    report.row("each", [each for _, each in done], None)
    report.say(f"\nAll of them: {took:.1f} s, {number / took:.1f} a second.")


def lift_limits(stack: Stack) -> None:
    """Let one token do as much as the machine can: plans are there to prevent just that."""
    names = ("api_requests_per_minute", "max_concurrent_sandboxes", "max_concurrent_commands")
    settings = ", ".join(f"{name} = 1000000" for name in names)
    with psycopg.connect(stack.layout.environment()["DATABASE_URL"]) as database:
        database.execute(f"UPDATE accounts_plan SET {settings}".encode())


def conditions() -> str:
    """The machine, the moment and the code."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    version = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {version.stdout.strip()}, "
        f"{os.cpu_count()} × {model}, {memory:.0f} GiB, Linux {platform.release()}, "
        f"load {os.getloadavg()[0]:.1f} when it began."
    )


def main(argv: Sequence[str]) -> int:
    """Start an installation, measure, remove it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.calls")
    parser.add_argument("--rounds", type=int, default=40, help="measurements of each (default 40)")
    parser.add_argument("--burst", type=int, default=100, help="sandboxes at once (default 100)")
    parser.add_argument("--out", type=Path, help="a file for the tables")
    options = parser.parse_args(argv)
    report = Report()
    report.say(f"# What calls take\n\n{conditions()}")
    with running_stack() as stack:
        lift_limits(stack)
        measure_alone(stack, report, options.rounds)
        measure_rates(stack, report)
        measure_burst(stack, report, options.burst)
    if options.out:
        options.out.write_text("\n".join(report.lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
