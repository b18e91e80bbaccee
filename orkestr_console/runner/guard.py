"""What `manage.py up` does while the console serves: replace and report what died or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from functools import partial

from hostruntime.host.patience import Patience, process_tree
from orkestr_console.runner.display import Display
from orkestr_console.runner.keeper import Keeper, ManagerUnresponsive
from orkestr_console.runner.layout import Layout, StartError
from orkestr_console.runner.watch import (
    Probe,
    Watch,
    agent_responds,
    is_running,
    is_stopped,
    web_responds,
)

CHECK_SECONDS = 1.0
# Short: while this waits for the process manager, it watches nothing.
STATES_TIMEOUT = 1.0
RETRY_SECONDS = 15.0
# How long programs may survive their manager, after the kernel's signal, until they are killed.
ORPHAN_SECONDS = 10.0

type States = dict[str, tuple[str, int]]


class Guard:
    """Watches one keeper and its programs until interrupted."""

    def __init__(self, layout: Layout, keeper: Keeper, display: Display) -> None:
        self._layout = layout
        self._keeper = keeper
        self._display = display
        self._states = keeper.states()
        self._last_retry = time.monotonic()
        self._manager = Watch(self._manager_responds, keeper.manager)
        self._watched = {
            name: Watch(question, partial(self._working, name))
            for name, question in self._questions().items()
            if name in self._states
        }

    def _questions(self) -> dict[str, Probe]:
        layout = self._layout
        return {
            "postgres": layout.cluster.responds,
            "agent": partial(agent_responds, layout.host_socket),
            # They have a watchdog of their own, which handles their other processes
            # (orkestr_console.http.processes, orkestr_console.queue.worker).
            "web": lambda: not self._is_stopped("web") and web_responds(layout),
            "worker": lambda: not self._is_stopped("worker"),
            "previews": lambda: not self._is_stopped("previews"),
        }

    def run(self) -> None:
        """Watch until an exception such as ``KeyboardInterrupt``."""
        while True:
            time.sleep(CHECK_SECONDS)
            self.check()

    def check(self) -> None:
        """Check the process manager, then its programs, once."""
        if not self._keeper.alive():
            self._restart_all(f"has ended:\n{self._keeper.tail('supervisord.log')}")
        elif symptom := self._manager.symptom():
            self._restart_all(f"hangs: it {symptom}")
        # A manager that is only slow is asked again.
        with contextlib.suppress(ManagerUnresponsive):
            self._check_programs()

    def _check_programs(self) -> None:
        states = self._keeper.states(STATES_TIMEOUT)
        for name, (state, pid) in states.items():
            if state == "FATAL" != self._states[name][0]:
                tail = self._keeper.tail(f"{name}.log")
                self._display.warn(f"{name} keeps failing; its log ends with:\n{tail}")
            elif state == "RUNNING" and pid != self._states[name][1]:
                self._display.warn(f"{name} had ended and was started again (process {pid})")
                self._reset_patience(name)
        self._states = states
        self._replace_hung(states)
        self._retry_failed(states)

    def _replace_hung(self, states: States) -> None:
        for name, watched in self._watched.items():
            if states[name][0] != "RUNNING":
                watched.reset()
            elif symptom := watched.symptom():
                self._display.warn(f"{name} does not answer: it {symptom}. It is started again")
                self._keeper.replace(name)
                watched.reset()

    def _reset_patience(self, name: str) -> None:
        if name in self._watched:
            self._watched[name].reset()

    def _retry_failed(self, states: States) -> None:
        """Restart programs that supervisord gave up on: a full disk may not be full later."""
        if time.monotonic() - self._last_retry < RETRY_SECONDS:
            return
        self._last_retry = time.monotonic()
        for name, (state, _) in states.items():
            if state == "FATAL":
                self._keeper.revive(name)

    def _restart_all(self, problem: str) -> None:
        """Start a process manager and all its programs, retrying until that works."""
        self._display.warn(f"the process manager {problem}\n  ! everything is started again")
        self._keeper.kill()
        self._kill_orphans(pid for _, pid in self._states.values() if pid)
        while True:
            try:
                self._keeper.start()
                for name in self._states:
                    self._keeper.launch(name)
                self._states = self._keeper.states()
                break
            except (StartError, ManagerUnresponsive, OSError) as error:
                self._display.warn(f"that failed, and is tried again: {error}")
                self._keeper.kill()
                time.sleep(RETRY_SECONDS)
        for watched in (self._manager, *self._watched.values()):
            watched.reset()

    def _kill_orphans(self, pids: Iterable[int]) -> None:
        """Kill programs that survived their manager: hung ones ignore the kernel's signal."""
        orphans = [pid for pid in pids if is_running(pid)]
        patience = Patience(ORPHAN_SECONDS, lambda: orphans)
        while orphans and not patience.exhausted():
            time.sleep(CHECK_SECONDS / 10)
            orphans = [pid for pid in orphans if is_running(pid)]
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _manager_responds(self) -> bool:
        try:
            self._keeper.states()
        except ManagerUnresponsive:
            return False
        return True

    def _working(self, name: str) -> list[int]:
        """The processes whose work shows that a program lives.

        The web's and the front's is done by their children.  Not so the agent's, whose children
        are tenants'.
        """
        if name not in {"web", "previews"}:
            return self._pids(name)
        return [each for pid in self._pids(name) for each in process_tree(pid)]

    def _is_stopped(self, name: str) -> bool:
        return any(map(is_stopped, self._pids(name)))

    def _pids(self, name: str) -> list[int]:
        pid = self._states[name][1]
        return [pid] if pid else []
