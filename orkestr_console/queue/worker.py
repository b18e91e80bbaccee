"""The queue's worker processes, and the watchdog over them.

::

    manage.py worker        the watchdog: starts the rest, checks that it is alive, ends all of it
     ├─ sentinel            django-q2's guard: replaces children that die, runs the schedule
     │   ├─ pusher          dispatches tasks from PostgreSQL to free workers
     │   ├─ monitor         stores the tasks' results
     │   └─ worker × n      runs tasks, and follows builds in threads
     └─ listener            polls the host for changes (``settings.LISTENER``)

Each asks the kernel to kill it when its parent dies (PR_SET_PDEATHSIG, prctl(2)), so none is ever
left behind. A killed worker's task is dispatched to another within seconds.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable
from importlib import import_module
from multiprocessing.process import BaseProcess
from typing import Any

from django.conf import settings
from django.db import Error, connections, transaction
from django.utils.module_loading import import_string
from django_q.cluster import Sentinel
from django_q.conf import Conf
from django_q.models import Schedule
from django_q.worker import worker as run_tasks

from orkestr_console.core.processes import Heartbeats, die_with, fork
from orkestr_console.queue.broker import PgBroker
from orkestr_console.queue.running import LockedTasks, Results
from orkestr_console.queue.sockets import SocketEvent, SocketQueue

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
# The heartbeats of a group of workers: the sentinel's, and the pusher's.
SENTINEL, PUSHER = range(2)
GROUP = 2
CHECK_SECONDS = 0.5
# Less than the process manager waits before it kills. Tasks need not finish: those cut off are
# dispatched again.
STOP_SECONDS = 8.0
RESTART_SECONDS = 1.0


class HeartbeatBroker(PgBroker):
    """The broker of a watched group: calling it counts as a heartbeat."""

    def __init__(self, pulse: Heartbeats, check: Callable[[], None]) -> None:
        super().__init__()
        self._pulse = pulse
        self._check = check

    def dequeue(self) -> list[tuple[str, str]] | None:
        """Called by the pusher in every round."""
        self._pulse.beat(PUSHER)
        return super().dequeue()

    def set_stat(self, key: str, value: str, timeout: int) -> None:
        """Called by the sentinel in every round."""
        self._pulse.beat(SENTINEL)
        self._check()


class Guard(Sentinel):  # type: ignore[misc]
    """django-q2's sentinel, with children that share no locks, die with it, and cannot hang."""

    def __init__(self, stop: SocketEvent, pulse: Heartbeats) -> None:
        broker = HeartbeatBroker(pulse, self._kill_stuck_workers)
        super().__init__(stop, threading.Event(), uuid.uuid4(), broker, Conf.TIMEOUT, start=False)
        self.task_queue = SocketQueue()
        self.result_queue = SocketQueue()
        self.event_out = SocketEvent()

    def spawn_process(self, target: Callable[..., None], *args: Any) -> BaseProcess:
        """Fork one child; workers go into the pool, as the sentinel expects."""
        if target is not run_tasks:
            child = fork.Process(target=run_child, args=(os.getpid(), target, *args), daemon=True)
        else:
            pulse = Heartbeats()
            arguments = (os.getpid(), run_locked, pulse, *args)
            child = fork.Process(target=run_child, args=arguments, daemon=True)
            child.pulse, child.timer = pulse, args[2]  # type: ignore[attr-defined]
            self.pool.append(child)
        child.start()
        return child

    def _kill_stuck_workers(self) -> None:
        """Kill stuck workers; the sentinel's next round replaces them."""
        for child in self.pool:
            if child.is_alive() and (symptom := child.pulse.stuck()):
                logger.error("a worker is stuck (it %s): replacing it", symptom)
                child.kill()


def run_child(parent: int, body: Callable[..., None], *args: Any) -> None:
    """The main function of a forked child."""
    die_with(parent)
    body(*args)


def run_locked(
    pulse: Heartbeats, tasks: SocketQueue, results: SocketQueue, timer: Any, timeout: int | None
) -> None:
    """Run django-q2's worker loop, each task under a lock of its run's name."""
    threading.Thread(target=heartbeat_forever, args=(pulse,), name="pulse", daemon=True).start()
    tasks_to_run = LockedTasks(tasks)
    run_tasks(tasks_to_run, Results(results), timer, timeout)
    tasks_to_run.finish()


def heartbeat_forever(pulse: Heartbeats) -> None:
    """Record that this process is alive, whatever its other threads do."""
    while True:
        pulse.beat()
        time.sleep(HEARTBEAT_SECONDS)


def run_group(parent: int, stop: SocketEvent, pulse: Heartbeats) -> None:
    """The main function of the sentinel, in its own process group.

    A process manager that signals the watchdog's group must not stop tasks too early.
    """
    os.setpgid(0, 0)
    die_with(parent)
    Guard(stop, pulse).start()


def run_listener(parent: int, pulse: Heartbeats) -> None:
    """The main function of the listener; it may be killed at any time."""
    die_with(parent)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    import_string(settings.LISTENER)(pulse.beat)


class ListenerSupervisor:
    """Keeps one listener running: its successor repeats what it had not finished."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pulse = Heartbeats()
        self._started_at = -RESTART_SECONDS

    def ensure_running(self) -> None:
        """Start the listener, or replace it if it has exited or is stuck."""
        if self._process is not None:
            symptom, status = self._pulse.stuck(), self._process.exitcode
            if status is None and not symptom:
                return
            problem = f"is stuck, it {symptom}" if symptom else f"has ended ({status})"
            logger.error("the listener %s: restarting it", problem)
            self.stop()
        if time.monotonic() - self._started_at >= RESTART_SECONDS:
            self._started_at, self._pulse = time.monotonic(), Heartbeats()
            arguments = (os.getpid(), self._pulse)
            self._process = fork.Process(target=run_listener, args=arguments, daemon=True)
            self._process.start()

    def stop(self) -> None:
        """Kill the listener."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


class Watchdog:
    """Keeps one group of workers and the listener running until asked to stop."""

    def __init__(self) -> None:
        self._stopping = False
        self._listener = ListenerSupervisor()

    def run(self) -> None:
        """Return after SIGTERM or SIGINT, when every process of the group has exited."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request_stop)
        try:
            self._run()
        finally:
            self._listener.stop()

    def _run(self) -> None:
        while not self._stopping:
            stop, pulse = SocketEvent(), Heartbeats(GROUP)
            group = fork.Process(target=run_group, args=(os.getpid(), stop, pulse))
            group.start()
            try:
                self._watch(group, pulse)
                stop.set()
                if self._stopping:
                    group.join(STOP_SECONDS)
            finally:
                # When the sentinel dies, the kernel kills its remaining children.
                group.kill()
                group.join()
            if not self._stopping:
                time.sleep(RESTART_SECONDS)

    def _request_stop(self, *_: object) -> None:
        self._stopping = True

    def _watch(self, group: BaseProcess, pulse: Heartbeats) -> None:
        """Return when asked to stop, or when the group needs a restart."""
        while not self._stopping:
            self._listener.ensure_running()
            group.join(CHECK_SECONDS)
            if group.exitcode is not None:
                logger.error("the worker group has exited (%s): restarting it", group.exitcode)
                return
            if symptom := pulse.stuck():
                logger.error("the worker group is stuck (it %s): restarting it", symptom)
                return


def use_plain_connections() -> None:
    """Have Django keep one connection per process: its pool's threads don't survive a fork."""
    database = connections.settings["default"]
    database["OPTIONS"].pop("pool", None)
    database["CONN_MAX_AGE"] = None
    connections.close_all()
    del connections["default"]


def ensure_schedules() -> None:
    """Make the schedule match ``settings.PERIODIC_TASKS``, keeping each task's next run."""
    wanted = {name: (func, minutes) for name, func, minutes in settings.PERIODIC_TASKS}
    with transaction.atomic():
        # One-time tasks stay.
        periodic = Schedule.objects.filter(schedule_type=Schedule.MINUTES)
        periodic.exclude(name__in=wanted).delete()
        for name, (func, minutes) in wanted.items():
            fields = {"func": func, "minutes": minutes, "schedule_type": Schedule.MINUTES}
            Schedule.objects.update_or_create(name=name, defaults={**fields, "repeats": -1})


def import_tasks() -> None:
    """Import the tasks' modules once, before forking, rather than in each worker's first task."""
    for _, func, _ in settings.PERIODIC_TASKS:
        import_module(func.rpartition(".")[0])
    import_string(settings.LISTENER)


def run_worker() -> None:
    """Run the queue's workers until SIGTERM. Waits until PostgreSQL is reachable."""
    use_plain_connections()
    import_tasks()
    while True:
        try:
            ensure_schedules()
            break
        except Error as error:
            logger.warning("cannot reach the database, retrying: %s", error)
            time.sleep(RESTART_SECONDS)
    connections.close_all()
    Watchdog().run()
