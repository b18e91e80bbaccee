"""Hours of ordinary use, and whether anything grows that should not.

Rounds of work by several clients at once, over HTTP as the SDK does it: create, commands, streams,
uploads, pauses, snapshots and what is started from them, builds, deletes.  After each round all
that it made is deleted, and the installation is counted while it rests: memory, descriptors and
threads of each program, processes, mounts, cgroups, network namespaces, loop devices, database
connections, rows, bytes on the disk.  For each count a line is fitted (least squares) to the rounds
after the first third, in which caches and pools fill; it *grows* when the line rises over the whole
time by more than the counts scatter around it, and by more than a hundredth.

Rows that are kept on purpose (the audit's, the deleted sandboxes') grow with use: they are shown by
operation.  Run it as root: ``python -m tests.benchmarks.soak --minutes 120``.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from orkestr import OrkestrClient, Sandbox, Snapshot
from orkestr.errors import OrkestrError

from hostruntime.host.paths import Instance
from hostruntime.host.patience import process_tree
from hostruntime.host.rundir import RunDir
from orkestr_console.runner.keeper import Keeper
from tests.clients.making import Templates
from tests.leftovers import host_names, instance_of, loops, mounts
from tests.processes import command_lines
from tests.stack import Stack, running_stack

BASE = "debian-12"
MIB = 1024 * 1024
UPLOAD = bytes(range(256)) * (4 * MIB // 256)
# Every so many rounds, as each takes longer than the rest of a round.
BUILD_EVERY, SNAPSHOT_EVERY = 4, 2
REST_SECONDS = 3.0
WARM_SHARE = 1 / 3
# What a line may rise by over all rounds without being said to grow.
NOISE_SHARE = 0.01
# Kept for people to look at, so they grow with what is done.
KEPT = ("rows ",)


@dataclass
class Work:
    """What the clients do, and how often they did it."""

    stack: Stack
    client: OrkestrClient
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)

    def round(self, number: int, clients: int) -> None:
        """One round of all clients; everything they made is gone afterwards."""
        jobs: list[Callable[[], None]] = [self._use] * clients
        if number % SNAPSHOT_EVERY == 0:
            jobs.append(self._snapshot)
        if number % BUILD_EVERY == 0:
            jobs.append(self._build)
        threads = [threading.Thread(target=self._try, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _try(self, job: Callable[[], None]) -> None:
        try:
            job()
        except (OrkestrError, AssertionError, OSError) as error:
            self.failed[f"{job.__name__.strip('_')}: {str(error)[:120]}"] += 1

    def _boot(self, template: str | None = None, **options: str) -> Sandbox:
        sandbox = Sandbox.create(template=template, client=self.client, **options)
        self.done["create"] += 1
        return sandbox

    def _use(self) -> None:
        sandbox = self._boot(BASE)
        try:
            for _ in range(10):
                assert sandbox.exec("echo $((6 * 7))").stdout == "42\n"
                self.done["exec"] += 1
            assert len([*sandbox.exec_stream("seq 2000; sleep 0.2; seq 2000")]) > 1
            self.done["stream"] += 1
            sandbox.files.write_bytes("/workspace/file", UPLOAD)
            assert sandbox.files.read_bytes("/workspace/file") == UPLOAD
            self.done["upload"] += 1
            sandbox.pause()
            Sandbox.resume(sandbox.id, client=self.client)
            self.done["pause"] += 1
        finally:
            self._end(sandbox)

    def _snapshot(self) -> None:
        sandbox = self._boot(BASE)
        try:
            sandbox.exec("echo kept > /workspace/kept")
            snapshot = sandbox.snapshot("soak")
            self.done["snapshot"] += 1
            try:
                fork = self._boot(None, snapshot=snapshot.id)
                try:
                    assert fork.exec("cat /workspace/kept").stdout == "kept\n"
                finally:
                    self._end(fork)
            finally:
                Snapshot.delete(snapshot.id, client=self.client)
        finally:
            self._end(sandbox)

    def _build(self) -> None:
        with self.stack.client() as client:
            templates = Templates(client)
            try:
                made = templates.ready(BASE, "head -c 20000000 /dev/urandom > /opt/data", "true")
                self.done["build"] += 1
                self._end(self._boot(made))
            finally:
                templates.delete_all()

    def _end(self, sandbox: Sandbox) -> None:
        sandbox.terminate()
        self.done["delete"] += 1


def sample(stack: Stack) -> dict[str, float]:
    """Everything that is counted, by name."""
    found: dict[str, float] = defaultdict(float)
    states = Keeper(stack.layout, ()).states()
    lines = command_lines().items()
    var = f"{stack.layout.var}/"
    managers = [pid for pid, line in lines if "supervisord" in line and var in line]
    for pid in managers:
        _count_process(found, "process manager", pid)
    for program, (_, pid) in states.items():
        for each in process_tree(pid) if pid else ():
            with suppress(OSError):
                _count_process(found, program, each)
    with stack.host() as host:
        instance = host.health().instance
    places = (stack.layout.var, RunDir.of(Instance(instance)).root)
    names = [name for name in host_names() if instance_of(name) == str(instance)]
    for kind in ("link", "netns", "cgroup", "table"):
        found[f"{kind}s"] = sum(1 for name in names if name.startswith(kind))
    found["mounts"] = sum(any(map(path.is_relative_to, places)) for path in mounts())
    found["loop devices"] = sum(any(map(path.is_relative_to, places)) for path in loops())
    found["disk MiB"] = _disk_mib(stack.layout.var)
    found.update(_database(stack))
    return dict(found)


def _count_process(found: dict[str, float], program: str, pid: int) -> None:
    process = Path("/proc") / str(pid)
    rollup = (process / "smaps_rollup").read_text().splitlines()
    pss = next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    descriptors = len([*(process / "fd").iterdir()])
    found[f"{program} memory MiB"] += pss / 1024
    found[f"{program} descriptors"] += descriptors
    found[f"{program} threads"] += len([*(process / "task").iterdir()])
    found[f"{program} processes"] += 1


def _disk_mib(root: Path) -> float:
    seen: set[tuple[int, int]] = set()
    total = 0
    for directory, _, files in root.walk(on_error=lambda _: None):
        for name in files:
            with suppress(OSError):
                status = (directory / name).lstat()
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_blocks * 512
    return total / MIB


def _database(stack: Stack) -> dict[str, float]:
    with psycopg.connect(stack.layout.environment()["DATABASE_URL"], autocommit=True) as database:
        others = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        found = {"database connections": float(_one(database, others) - 1)}
        tables = database.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        for (table,) in tables.fetchall():
            counted = psycopg.sql.SQL("SELECT count(*) FROM {}").format(
                psycopg.sql.Identifier(table)
            )
            found[f"rows {table}"] = float(_one(database, counted))
    return found


def _one(database: psycopg.Connection[tuple[int]], query: psycopg.abc.Query) -> int:
    row = database.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@dataclass(frozen=True)
class Line:
    """How one count went over the rounds."""

    name: str
    first: float
    last: float
    rise: float
    scatter: float

    @classmethod
    def of(cls, name: str, times: Sequence[float], counts: Sequence[float]) -> Line:
        """Least squares; ``rise`` is the fitted line's over the whole time."""
        slope, start = statistics.linear_regression(times, counts)
        away = [count - (start + slope * at) for at, count in zip(times, counts, strict=True)]
        rise = slope * (times[-1] - times[0])
        return cls(name, counts[0], counts[-1], rise, statistics.pstdev(away))

    @property
    def grows(self) -> bool:
        """Whether it rises by more than it scatters."""
        return self.rise > max(2 * self.scatter, NOISE_SHARE * self.first, 0.5)

    def text(self, operations: int) -> str:
        """A row of the table."""
        verdict = "flat"
        if self.name.startswith(KEPT):
            verdict = f"{self.rise / max(operations, 1):.2f} each" if self.rise > 0.5 else "flat"
        elif self.grows:
            verdict = "GROWS"
        numbers = f"{self.first:>12.1f}{self.last:>12.1f}{self.rise:>12.2f}{self.scatter:>10.2f}"
        return f"{self.name:<44}{numbers}  {verdict}"


def table(times: Sequence[float], samples: Sequence[Mapping[str, float]], done: int) -> list[str]:
    """All counts that are not nothing, as lines."""
    warm = int(len(samples) * WARM_SHARE)
    times, samples = times[warm:], samples[warm:]
    lines = [f"{'':<44}{'first':>12}{'last':>12}{'rise':>12}{'scatter':>10}"]
    for name in sorted({name for one in samples for name in one}):
        counts = [one.get(name, 0.0) for one in samples]
        if any(counts):
            lines.append(Line.of(name, times, counts).text(done))
    return lines


def soak(stack: Stack, minutes: float, clients: int, out: Path | None) -> None:
    """Work for so long; the table is printed, and written after each round."""
    began = time.monotonic()
    times: list[float] = []
    samples: list[dict[str, float]] = []
    with OrkestrClient(api_key=stack.api_key, base_url=stack.url) as client:
        work = Work(stack, client)
        while time.monotonic() < began + minutes * 60:
            work.round(len(samples), clients)
            time.sleep(REST_SECONDS)
            times.append(time.monotonic() - began)
            samples.append(sample(stack))
            if out is not None and len(samples) > 5:
                out.write_text(report(times, samples, work))
    sys.stdout.write(report(times, samples, work))


def report(times: Sequence[float], samples: Sequence[Mapping[str, float]], work: Work) -> str:
    """What was done and how the counts went."""
    done = ", ".join(f"{count} × {what}" for what, count in work.done.most_common())
    failed = [f"failed {count} ×: {what}" for what, count in work.failed.most_common()]
    head = [f"{len(samples)} rounds in {times[-1] / 60:.0f} min: {done}", *failed, ""]
    return "\n".join([*head, *table(times, samples, work.done["create"]), ""])


def main() -> None:
    """Soak a whole installation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file to keep the table in as it grows")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        # A shell has what it starts in the background ignore SIGINT.
        signal.signal(number, signal.default_int_handler)
    with running_stack() as stack:
        soak(stack, options.minutes, options.clients, options.out)


if __name__ == "__main__":
    main()
