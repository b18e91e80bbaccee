"""What `manage.py up` does while the console serves: replace what died or hangs, and say so."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from functools import partial

from hostruntime.host.patience import Patience
from orkestr_console.runner.display import Display
from orkestr_console.runner.keeper import Keeper, ManagerSilent
from orkestr_console.runner.layout import Layout, StartError
from orkestr_console.runner.watch import (
    Question,
    Watched,
    agent_responds,
    is_running,
    is_stopped,
    web_responds,
)

WATCH_SECONDS = 1.0
# Not longer: while this waits for the process manager, it watches nothing.
GLANCE_SECONDS = 1.0
REVIVE_SECONDS = 15.0
# After which what the manager left behind, and was asked by the kernel to end, is killed.
LEFT_BEHIND_SECONDS = 10.0

type States = dict[str, tuple[str, int]]


class Guard:
    """Watches one keeper and its programs until interrupted."""

    def __init__(self, layout: Layout, keeper: Keeper, display: Display) -> None:
        self._layout = layout
        self._keeper = keeper
        self._display = display
        self._known = keeper.states()
        self._revived = time.monotonic()
        self._manager = Watched(self._manager_answers, keeper.manager)
        self._watched = {
            name: Watched(question, partial(self._process_of, name))
            for name, question in self._questions().items()
            if name in self._known
        }

    def _questions(self) -> dict[str, Question]:
        layout = self._layout
        return {
            "postgres": layout.cluster.responds,
            "agent": partial(agent_responds, layout.host_socket),
            "web": partial(web_responds, layout),
            # Its own watchdog sees to the rest of its processes (orkestr_console.queue.worker).
            "worker": lambda: not any(map(is_stopped, self._process_of("worker"))),
        }

    def run(self) -> None:
        """Watch, for ever; ends by an exception such as ``KeyboardInterrupt``."""
        while True:
            time.sleep(WATCH_SECONDS)
            self.look()

    def look(self) -> None:
        """One round: see to the process manager, then to its programs."""
        if not self._keeper.alive():
            self._start_over(f"has ended:\n{self._keeper.tail('supervisord.log')}")
        elif seen := self._manager.hung():
            self._start_over(f"hangs: it {seen}")
        # One that only takes its time is asked again.
        with contextlib.suppress(ManagerSilent):
            self._look_at_programs()

    def _look_at_programs(self) -> None:
        now = self._keeper.states(GLANCE_SECONDS)
        for name, (state, pid) in now.items():
            if state == "FATAL" != self._known[name][0]:
                tail = self._keeper.tail(f"{name}.log")
                self._display.warn(f"{name} keeps failing; its log ends with:\n{tail}")
            elif state == "RUNNING" and pid != self._known[name][1]:
                self._display.warn(f"{name} had ended and was started again (process {pid})")
                self._begin(name)
        self._known = now
        self._replace_what_hangs(now)
        self._revive(now)

    def _replace_what_hangs(self, states: States) -> None:
        for name, watched in self._watched.items():
            if states[name][0] != "RUNNING":
                watched.begin()
            elif seen := watched.hung():
                self._display.warn(f"{name} does not answer: it {seen}. It is started again")
                self._keeper.replace(name)
                watched.begin()

    def _begin(self, name: str) -> None:
        if name in self._watched:
            self._watched[name].begin()

    def _revive(self, states: States) -> None:
        """supervisord gives up after a while; a disk that is full now may not be later."""
        if time.monotonic() - self._revived < REVIVE_SECONDS:
            return
        self._revived = time.monotonic()
        for name, (state, _) in states.items():
            if state == "FATAL":
                self._keeper.revive(name)

    def _start_over(self, what: str) -> None:
        """Start a process manager and all its programs, for as often as it takes."""
        self._display.warn(f"the process manager {what}\n  ! everything is started again")
        self._keeper.kill()
        self._end_what_is_left(pid for _, pid in self._known.values() if pid)
        while True:
            try:
                self._keeper.start()
                for name in self._known:
                    self._keeper.launch(name)
                self._known = self._keeper.states()
                break
            except (StartError, ManagerSilent, OSError) as error:
                self._display.warn(f"that failed, and is tried again: {error}")
                self._keeper.kill()
                time.sleep(REVIVE_SECONDS)
        for watched in (self._manager, *self._watched.values()):
            watched.begin()

    def _end_what_is_left(self, pids: Iterable[int]) -> None:
        """The kernel has told the programs to end with their manager; those that hang cannot."""
        left = [pid for pid in pids if is_running(pid)]
        patience = Patience(LEFT_BEHIND_SECONDS, lambda: left)
        while left and not patience.exhausted():
            time.sleep(WATCH_SECONDS / 10)
            left = [pid for pid in left if is_running(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _manager_answers(self) -> bool:
        try:
            self._keeper.states()
        except ManagerSilent:
            return False
        return True

    def _process_of(self, name: str) -> list[int]:
        pid = self._known[name][1]
        return [pid] if pid else []
