"""The queue's worker processes, and the watchdog over them.

::

    manage.py worker        the watchdog: starts the rest, sees that it lives, ends it whole
     ├─ sentinel            django-q2's guard: replaces children that die, runs the schedule
     │   ├─ pusher          gives tasks of PostgreSQL's to free workers
     │   ├─ monitor         stores what became of tasks
     │   └─ worker × n      runs them, and follows builds in threads
     └─ listener            hears from the host what has ended (``settings.LISTENER``)

Each asks the kernel to be killed when its parent dies (PR_SET_PDEATHSIG, prctl(2)), so no way of
dying leaves one behind. What a killed worker ran is given to another within seconds.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from importlib import import_module
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from typing import Any

from django.conf import settings
from django.db import Error, connections, transaction
from django.utils.module_loading import import_string
from django_q.cluster import Sentinel
from django_q.conf import Conf
from django_q.models import Schedule
from django_q.worker import worker as run_tasks

from hostruntime.host.patience import Patience
from orkestr_console.queue.broker import PgBroker
from orkestr_console.queue.running import HeldTasks, Results
from orkestr_console.queue.sockets import SocketEvent, SocketQueue

logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
STALE_SECONDS = settings.WORKER_STALE_SECONDS
BEAT_SECONDS = 1.0
WATCH_SECONDS = 0.5
# Less than what the process manager waits before it kills. Not for as long as they work: what is
# cut off comes back.
STOP_SECONDS = 8.0
RESTART_SECONDS = 1.0

fork = multiprocessing.get_context("fork")


def die_with(parent: int) -> None:
    """Have the kernel kill this process when process ``parent``, which forked it, ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        # It ended before we asked.
        os._exit(1)


class Pulse:
    """How often sentinel and pusher came round, in shared memory that nobody locks.

    Or another number of processes.
    """

    def __init__(self, processes: int = 2) -> None:
        self._beats = RawArray("L", processes)
        self._pids = RawArray("L", processes)
        # What the watchdog has seen of them, and since when it waits for more.
        self._seen = [0] * processes
        self._patience = [self._anew(which) for which in range(processes)]

    def beat(self, which: int) -> None:
        """Sentinel (0) or pusher (1) is alive now; it is the calling process."""
        self._beats[which] += 1
        self._pids[which] = os.getpid()

    def stuck(self) -> str:
        """What is seen of one that comes round no more, and does nothing else either, if so."""
        for which in range(len(self._seen)):
            if self._beats[which] != self._seen[which]:
                self._seen[which] = self._beats[which]
                self._patience[which] = self._anew(which)
            elif self._patience[which].exhausted():
                return self._patience[which].reason
        return ""

    def _anew(self, which: int) -> Patience:
        return Patience(STALE_SECONDS, lambda: [pid for pid in [self._pids[which]] if pid])


class PulsingBroker(PgBroker):
    """The broker of a group under watch: whoever calls it is alive."""

    def __init__(self, pulse: Pulse, look: Callable[[], None]) -> None:
        super().__init__()
        self._pulse = pulse
        self._look = look

    def dequeue(self) -> list[tuple[str, str]] | None:
        """The pusher's every round."""
        self._pulse.beat(1)
        return super().dequeue()

    def set_stat(self, key: str, value: str, timeout: int) -> None:
        """The sentinel's every round."""
        self._pulse.beat(0)
        self._look()


class Guard(Sentinel):  # type: ignore[misc]
    """django-q2's guard over children that lock nothing, die with it, and do not hang for long."""

    def __init__(self, stop: SocketEvent, pulse: Pulse) -> None:
        broker = PulsingBroker(pulse, self._look_at_workers)
        super().__init__(stop, threading.Event(), uuid.uuid4(), broker, Conf.TIMEOUT, start=False)
        self.task_queue = SocketQueue()
        self.result_queue = SocketQueue()
        self.event_out = SocketEvent()

    def spawn_process(self, target: Callable[..., None], *args: Any) -> BaseProcess:
        """Fork one child; workers go into the pool, as the guard expects."""
        if target is not run_tasks:
            child = fork.Process(target=be_child, args=(os.getpid(), target, *args), daemon=True)
        else:
            pulse = Pulse(1)
            whole = (os.getpid(), run_held, pulse, *args)
            child = fork.Process(target=be_child, args=whole, daemon=True)
            child.pulse, child.timer = pulse, args[2]  # type: ignore[attr-defined]
            self.pool.append(child)
        child.start()
        return child

    def _look_at_workers(self) -> None:
        """Kill those that are stuck; the guard's next round replaces them."""
        for child in self.pool:
            if child.is_alive() and (seen := child.pulse.stuck()):
                logger.error("a worker is stuck, it %s: starting another", seen)
                child.kill()


def be_child(parent: int, body: Callable[..., None], *args: Any) -> None:
    """A forked child's whole life."""
    die_with(parent)
    body(*args)


def run_held(
    pulse: Pulse, tasks: SocketQueue, results: SocketQueue, timer: Any, timeout: int | None
) -> None:
    """django-q2's worker loop, each task under a lock of its run's name."""
    threading.Thread(target=beat_for_ever, args=(pulse,), name="pulse", daemon=True).start()
    held = HeldTasks(tasks)
    run_tasks(held, Results(results), timer, timeout)
    held.finish()


def beat_for_ever(pulse: Pulse) -> None:
    """Say that this process lives, whatever its other threads do."""
    while True:
        pulse.beat(0)
        time.sleep(BEAT_SECONDS)


def run_group(parent: int, stop: SocketEvent, pulse: Pulse) -> None:
    """The sentinel's whole life, in a process group of its own.

    A process manager that signals the watchdog's group must not stop tasks before it is their turn.
    """
    os.setpgid(0, 0)
    die_with(parent)
    Guard(stop, pulse).start()


def run_listener(parent: int, pulse: Pulse) -> None:
    """The listener's whole life; it may be killed at any moment."""
    die_with(parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    import_string(settings.LISTENER)(partial(pulse.beat, 0))


class Listening:
    """Keeps one listener running: what it had not heard to the end its successor hears."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pulse = Pulse(1)
        self._began = -RESTART_SECONDS

    def look(self) -> None:
        """Start one if there is none; another if it has ended, or is stuck."""
        if self._process is not None:
            seen, status = self._pulse.stuck(), self._process.exitcode
            if status is None and not seen:
                return
            what = f"is stuck, it {seen}" if seen else f"has ended ({status})"
            logger.error("the listener %s: starting anew", what)
            self.stop()
        if time.monotonic() - self._began >= RESTART_SECONDS:
            self._began, self._pulse = time.monotonic(), Pulse(1)
            arguments = (os.getpid(), self._pulse)
            self._process = fork.Process(target=run_listener, args=arguments, daemon=True)
            self._process.start()

    def stop(self) -> None:
        """End it, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Watchdog:
    """Keeps one group of workers, and the listener, running until told to stop."""

    def __init__(self) -> None:
        self._stopping = False
        self._listening = Listening()

    def run(self) -> None:
        """Return after SIGTERM or SIGINT, when every process of the group has ended."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        try:
            self._run()
        finally:
            self._listening.stop()

    def _run(self) -> None:
        while not self._stopping:
            stop, pulse = SocketEvent(), Pulse()
            group = fork.Process(target=run_group, args=(os.getpid(), stop, pulse))
            group.start()
            try:
                self._watch(group, pulse)
                stop.set()
                if self._stopping:
                    group.join(STOP_SECONDS)
            finally:
                # With the sentinel, the kernel kills whatever is left of its children.
                group.kill()
                group.join()
            if not self._stopping:
                time.sleep(RESTART_SECONDS)

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True

    def _watch(self, group: BaseProcess, pulse: Pulse) -> None:
        """Return when asked to stop, or when the group needs to be started anew."""
        while not self._stopping:
            self._listening.look()
            group.join(WATCH_SECONDS)
            if group.exitcode is not None:
                logger.error("the worker group has ended (%s): starting anew", group.exitcode)
                return
            if seen := pulse.stuck():
                logger.error("the worker group is stuck, it %s: starting anew", seen)
                return


def use_plain_connections() -> None:
    """Have Django keep one connection a process: its pool's threads do not survive a fork."""
    database = connections.settings["default"]
    database["OPTIONS"].pop("pool", None)
    database["CONN_MAX_AGE"] = None
    connections.close_all()
    del connections["default"]


def ensure_schedules() -> None:
    """Make the schedule's rows what ``settings.PERIODIC_TASKS`` says, keeping when each is next."""
    wanted = {name: (func, minutes) for name, func, minutes in settings.PERIODIC_TASKS}
    with transaction.atomic():
        # What is to be done once, later, stays.
        periodic = Schedule.objects.filter(schedule_type=Schedule.MINUTES)
        periodic.exclude(name__in=wanted).delete()
        for name, (func, minutes) in wanted.items():
            facts = {"func": func, "minutes": minutes, "schedule_type": Schedule.MINUTES}
            Schedule.objects.update_or_create(name=name, defaults={**facts, "repeats": -1})


def import_tasks() -> None:
    """Import what tasks run once, before the forks, rather than in each worker's first task."""
    for _, func, _ in settings.PERIODIC_TASKS:
        import_module(func.rpartition(".")[0])
    import_string(settings.LISTENER)


def run_worker() -> None:
    """Run the queue's workers until SIGTERM. Waits for PostgreSQL if it is not there yet."""
    use_plain_connections()
    import_tasks()
    while True:
        try:
            ensure_schedules()
            break
        except Error as error:
            logger.warning("the database cannot be reached, trying again: %s", error)
            time.sleep(RESTART_SECONDS)
    connections.close_all()
    Watchdog().run()
