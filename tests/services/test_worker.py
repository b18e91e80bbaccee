"""The worker's processes, really started, really killed: no task is lost, none runs twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from django_q.models import OrmQ, Schedule
from django_q.tasks import async_task

pytestmark = pytest.mark.django_db(transaction=True)

TREE = Path(__file__).resolve().parents[2]
STALE = 6.0
# More than the pusher needs to be sure that nobody runs a task.
LONG = 5.0
WORKERS = 4
NOTE = "tests.services.worker_tasks.note"


class Journal:
    """What the tasks of ``worker_tasks`` wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.path.read_text().splitlines()]

    def pids(self, what: str, name: str) -> list[int]:
        return [int(line[2]) for line in self.lines() if line[:2] == [what, name]]

    def at(self, what: str, name: str) -> float:
        return next(float(line[3]) for line in self.lines() if line[:2] == [what, name])

    def counted(self, what: str) -> Counter[str]:
        return Counter(line[1] for line in self.lines() if line[0] == what)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def children(pid: int) -> list[int]:
    """Process ids of the direct children (proc(5))."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def process_group(pid: int) -> int:
    """0 for a process that has ended."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


class Worker:
    """`manage.py worker` against the test database, in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "worker.log"
        database = connection.settings_dict
        host = database["HOST"] or database["OPTIONS"].get("host", "")
        login = f"{database['USER']}:{database['PASSWORD']}".rstrip(":")
        url = f"postgres://{login}@/{database['NAME']}?host={host}"
        if database["PORT"]:
            url += f"&port={database['PORT']}"
        environment = {
            **os.environ,
            "DATABASE_URL": url,
            "ORKESTR_SECRET_KEY": settings.SECRET_KEY,
            "ORKESTR_WORKER_STALE": str(STALE),
            "ORKESTR_WORKERS": str(WORKERS),
        }
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "worker"],
                cwd=TREE,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def sentinel(self) -> int:
        """The one of the watchdog's children that has a process group of its own."""
        found = [pid for pid in children(self.process.pid) if process_group(pid) == pid]
        return found[0] if found else 0

    def listener(self) -> int:
        found = [pid for pid in children(self.process.pid) if process_group(pid) != pid]
        return found[0] if found else 0

    def members(self) -> list[int]:
        """Sentinel, workers, monitor and pusher, in the order they were started."""
        sentinel = self.sentinel()
        return [sentinel, *children(sentinel)] if sentinel else []

    def workers(self) -> list[int]:
        return self.members()[1 : 1 + WORKERS]

    def wait_until_ready(self) -> None:
        wait_for(lambda: len(self.members()) >= WORKERS + 3)

    def explain(self) -> str:
        return self.log.read_text()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path)
    try:
        worker.wait_until_ready()
        yield worker
    finally:
        members = worker.members()
        worker.process.kill()
        worker.process.wait()
        wait_for(lambda: not any(alive(pid) for pid in members))
        # The test database is dropped next, which no straggler may be connected to.


def put(journal: Journal, name: str, seconds: float = 0.0) -> None:
    async_task(NOTE, str(journal.path), name, seconds)


def test_tasks_run_once_each_and_start_at_once(worker: Worker, journal: Journal) -> None:
    put(journal, "warm-up")
    wait_for(lambda: bool(journal.pids("end", "warm-up")))
    delays = []
    for number in range(20):
        began = time.monotonic()
        put(journal, f"t{number}")
        wait_for(lambda number=number: bool(journal.pids("end", f"t{number}")))  # type: ignore[misc]
        delays.append(journal.at("start", f"t{number}") - began)
    assert set(journal.counted("start").values()) == {1}
    assert median(delays) < 0.5
    wait_for(lambda: OrmQ.objects.count() == 0)


def test_a_task_that_takes_long_runs_once(worker: Worker, journal: Journal) -> None:
    put(journal, "long", LONG)
    for number in range(2 * WORKERS):
        put(journal, f"t{number}", 0.2)
    wait_for(lambda: bool(journal.pids("end", "long")), 4 * LONG)
    wait_for(lambda: OrmQ.objects.count() == 0)
    assert set(journal.counted("start").values()) == {1}
    assert sum(journal.counted("end").values()) == 2 * WORKERS + 1


def test_the_task_of_a_killed_worker_comes_back(worker: Worker, journal: Journal) -> None:
    put(journal, "victim", 1.5)
    wait_for(lambda: bool(journal.pids("start", "victim")))
    (pid,) = journal.pids("start", "victim")
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(journal.pids("start", "victim")) == 2, 10)
    wait_for(lambda: bool(journal.pids("end", "victim")))
    assert journal.counted("start")["victim"] == 2


def test_workers_killed_while_idle_hold_nobody_up(worker: Worker, journal: Journal) -> None:
    for pid in worker.workers():
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    tasks = 60
    for number in range(tasks):
        put(journal, f"t{number}")
    wait_for(lambda: sum(journal.counted("end").values()) == tasks)
    # One that a dead worker had been given would come back behind all the others; on a busy machine
    # a worker that has just been started is some tasks late.
    started = [int(line[1].removeprefix("t")) for line in journal.lines() if line[0] == "start"]
    assert all(abs(place - number) < tasks // 2 for place, number in enumerate(started)), started
    assert len(started) == len(set(started))


@pytest.mark.parametrize("which", [-1, -2], ids=["pusher", "monitor"])
def test_pusher_and_monitor_are_replaced(worker: Worker, journal: Journal, which: int) -> None:
    os.kill(worker.members()[which], signal.SIGKILL)
    put(journal, "after")
    wait_for(lambda: bool(journal.pids("end", "after")))
    assert journal.counted("start")["after"] == 1


def test_a_group_that_hangs_is_started_anew(worker: Worker, journal: Journal) -> None:
    before = worker.members()
    os.kill(worker.sentinel(), signal.SIGSTOP)
    wait_for(lambda: not any(alive(pid) for pid in before), STALE + 10)
    worker.wait_until_ready()
    put(journal, "after")
    wait_for(lambda: bool(journal.pids("end", "after")))


def test_a_worker_that_hangs_is_replaced_and_its_task_runs(
    worker: Worker, journal: Journal
) -> None:
    """While it is stopped it holds its lock still: only its end tells that it works no more."""
    put(journal, "victim", 1.5)
    wait_for(lambda: bool(journal.pids("start", "victim")))
    (pid,) = journal.pids("start", "victim")
    others = set(worker.members()) - {pid}
    os.kill(pid, signal.SIGSTOP)
    put(journal, "meanwhile")
    wait_for(lambda: bool(journal.pids("end", "meanwhile")))
    wait_for(lambda: not alive(pid), STALE + 20)
    wait_for(lambda: bool(journal.pids("end", "victim")))
    assert journal.counted("start") == {"victim": 2, "meanwhile": 1}
    assert others <= set(worker.members())


def test_a_sentinel_that_is_killed_takes_its_group_along(worker: Worker, journal: Journal) -> None:
    before = worker.members()
    os.kill(worker.sentinel(), signal.SIGKILL)
    wait_for(lambda: not any(alive(pid) for pid in before))
    worker.wait_until_ready()
    put(journal, "after")
    wait_for(lambda: bool(journal.pids("end", "after")))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_listener_is_replaced_and_the_group_works_on(
    worker: Worker, journal: Journal, number: int
) -> None:
    wait_for(lambda: bool(worker.listener()))
    before, members = worker.listener(), worker.members()
    os.kill(before, number)
    wait_for(lambda: not alive(before), STALE + 20)
    wait_for(lambda: worker.listener() not in {0, before})
    assert worker.members() == members


def test_killing_the_watchdog_leaves_no_orphans(worker: Worker, journal: Journal) -> None:
    put(journal, "busy", 60)
    wait_for(lambda: bool(journal.pids("start", "busy")))
    members = [*worker.members(), worker.listener()]
    worker.process.kill()
    worker.process.wait()
    wait_for(lambda: not any(alive(pid) for pid in members), 5)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_sigterm_ends_everything(worker: Worker, journal: Journal, busy: bool) -> None:
    if busy:
        put(journal, "busy", 60)
        wait_for(lambda: bool(journal.pids("start", "busy")))
    members = [*worker.members(), worker.listener()]
    worker.process.terminate()
    assert worker.process.wait(12) == 0
    wait_for(lambda: not any(alive(pid) for pid in members), 5)


def test_lost_connections_cost_no_task(worker: Worker, journal: Journal) -> None:
    put(journal, "long", LONG)
    wait_for(lambda: bool(journal.pids("start", "long")))
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    # This process's own pool was hit as well: the tests after this begin with a new one.
    database: Any = connection
    database.close()
    database.close_pool()
    put(journal, "short")
    wait_for(lambda: bool(journal.pids("end", "short")))
    wait_for(lambda: bool(journal.pids("end", "long")), 4 * LONG)
    time.sleep(LONG)
    assert journal.counted("start") == {"long": 1, "short": 1}


def test_a_task_that_fails_is_not_tried_again(worker: Worker, journal: Journal) -> None:
    async_task("tests.services.worker_tasks.fail", str(journal.path), "bad")
    wait_for(lambda: bool(journal.pids("start", "bad")))
    wait_for(lambda: OrmQ.objects.count() == 0)
    time.sleep(LONG)
    assert journal.counted("start")["bad"] == 1


def test_the_schedule_is_what_the_settings_say(worker: Worker) -> None:
    found = set(Schedule.objects.values_list("name", "func", "minutes"))
    assert found == set(settings.PERIODIC_TASKS)
