"""One cell of the matrix: reach a moment, strike a process, wait until all is well, and check."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import psycopg

from hostruntime.errors import HostError
from hostruntime.host.patience import scaled
from orkestr_console.runner.keeper import ManagerUnresponsive
from tests.faults.calls import CUT, SILENCE, Answer, Probe, results
from tests.faults.installation import Installation
from tests.faults.moments import MOMENTS, Missed, Scene
from tests.faults.processes import Process, is_there, owners_of, strike
from tests.faults.truth import holdings, of_the_ended, still_running, wrong_rows

# Within which no row may be wrong once the service answers and its clients have their answers.
TARGET_SECONDS = 10.0
# In which what hangs is noticed, and all answers again; far more than either takes.
NOTICE_SECONDS, BACK_SECONDS = 120.0, 180.0
# What is seen of the worker is looked at every second.
STEADY_SECONDS = 1.5
TIDY_SECONDS = 20.0
TRIES = 4
MOST_TOLD = 6
# A host name that no policy allows: the proxy and its helper refuse it, and ask nobody.
ASK_PROXY = (
    "P=${HTTPS_PROXY#http://}; exec 3<>/dev/tcp/${P%:*}/${P#*:} && "
    "printf 'CONNECT probe.invalid:443 HTTP/1.0\\r\\n\\r\\n' >&3 && timeout 5 head -1 <&3"
)
AWAY = (HostError, OSError, ManagerUnresponsive, psycopg.Error, IndexError, ValueError, KeyError)


@dataclass(frozen=True)
class Result:
    """What came of a cell. ``back`` and ``settled`` in seconds, None for never.

    ``back`` is from the strike until everything answers, ``settled`` from then, or from the last
    client's answer, until no row is wrong. ``skipped`` is the reason for which there is neither.
    """

    process: str
    how: str
    moment: str
    back: float | None = None
    settled: float | None = None
    wrong: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    skipped: str = ""


@dataclass
class Known:
    """What is carried from cell to cell: what is on the host when none is run, and what was told.

    ``left`` was left behind by earlier cells, and ``rows`` were wrong in them.
    """

    holdings: Counter[str]
    left: Counter[str] = field(default_factory=Counter)
    rows: set[str] = field(default_factory=set)


def run_cell(
    installation: Installation, known: Known, process: Process, how: signal.Signals, moment: str
) -> Result:
    """Run one cell, again where its moment was over too soon."""
    for _ in range(TRIES):
        cell = Cell(installation, known, process, how, moment)
        with suppress(Missed):
            return cell.run()
        installation.tidy()
    reason = f"the moment was over too soon {TRIES} times"
    return Result(process.name, how.name, moment, skipped=reason)


class Cell:
    """One run of one cell."""

    def __init__(
        self,
        installation: Installation,
        known: Known,
        process: Process,
        how: signal.Signals,
        moment: str,
    ) -> None:
        self.installation = installation
        self.known = known
        self.process = process
        self.how = how
        self.moment = moment
        self.wrong: list[str] = []
        self.told: list[str] = []

    def run(self) -> Result:
        """Everything in order. Raises Missed when the moment was not reached."""
        with self.installation.client() as client, self._probing() as probes:
            # Looking for a process takes longer than some moments last.
            pids = self.process.find(self.installation, []) if self.process.comes_back else []
            scene = MOMENTS[self.moment](self.installation, client)
            struck_at, struck = self._strike(scene, pids)
            self._await_end(struck)
            back = self._await_answers(struck_at, struck, probes)
            answers = results(scene.calls)
            self._judge(answers, [answer for probe in probes for answer in probe.answers])
            if back is None:
                raise AssertionError(f"it does not come back: {self.wrong}")
            settled = self._await_rows(max([back, *(one.ended for one in answers)]))
            self.wrong += [*self._leftovers(), *self.installation.harm(), *scene.after()]
        self._tidy()
        return Result(
            self.process.name,
            self.how.name,
            self.moment,
            back - struck_at,
            settled,
            tuple(dict.fromkeys(self.wrong)),
            tuple(dict.fromkeys(self.told)),
        )

    # Striking -------------------------------------------------------------------------------

    def _strike(self, scene: Scene, pids: list[int]) -> tuple[float, list[int]]:
        pids = pids or self.process.find(self.installation, scene.subjects)
        if not self.process.comes_back:
            self._ending = owners_of(self.installation, scene.subjects, pids)
        struck_at, struck = time.monotonic(), strike(pids, self.how)
        if not scene.still():
            self.told.append("the moment was just over")
        if self.process.name == "up":
            threading.Thread(target=self.installation.resurrect, daemon=True).start()
        scene.go_on()
        if not struck:
            raise Missed
        return struck_at, struck

    def _await_end(self, struck: list[int]) -> None:
        if not self._within(NOTICE_SECONDS, lambda: not any(map(is_there, struck))):
            self.wrong.append(f"it hung for {NOTICE_SECONDS:.0f} s and was not replaced")
            strike(struck, signal.SIGKILL)

    def _await_answers(
        self, struck_at: float, struck: list[int], probes: list[Probe]
    ) -> float | None:
        """When everything answered again, and went on to."""
        if not self._within(BACK_SECONDS, lambda: self._is_replaced(struck)):
            self.wrong.append("no other was started in its place")
            return None
        replaced = time.monotonic()
        since = struck_at if self.how is signal.SIGKILL else replaced

        def well() -> list[float | None]:
            return [probe.answered_since(replaced + STEADY_SECONDS) for probe in probes]

        if not self._within(BACK_SECONDS, lambda: None not in well()):
            silent = [str(probe.answers[-1]) for probe in probes if probe.well_since is None]
            self.wrong.append(f"did not answer again within {BACK_SECONDS:.0f} s: {silent}")
            return None
        began = [probe.well_since for probe in probes if probe.well_since is not None]
        return max(since, *began)

    def _is_replaced(self, struck: list[int]) -> bool:
        if not self.process.comes_back:
            return True
        try:
            found = self.process.find(self.installation, [])
        except AWAY:
            return False
        return bool(found) and not set(found) & {0, *struck}

    # Waiting --------------------------------------------------------------------------------

    def _within(self, seconds: float, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _await_rows(self, since: float) -> float | None:
        """How many seconds after ``since`` no row was wrong any more."""
        longest = max(self.settle_seconds, scaled(TARGET_SECONDS))
        limit = max(longest - (time.monotonic() - since), 1.0)
        if self._within(limit, self._are_settled):
            seconds = max(time.monotonic() - STEADY_SECONDS - since, 0.0)
            if seconds > scaled(TARGET_SECONDS):
                self.wrong.append(f"rows were wrong for {seconds:.0f} s, such as {self._last}")
            return seconds
        rows = self._rows()
        self.wrong += [f"wrong after {longest:.0f} s: {row}" for row in rows]
        self.known.rows |= {row.split()[0] for row in rows}
        return None

    settle_seconds = 30.0
    _last = ""
    # Owners of containers that end with what was struck.
    _ending: Sequence[str] = ()

    def _are_settled(self) -> bool:
        """Whether no row is wrong, nor is any while the host comes to know what has ended."""
        if self._rows():
            return False
        time.sleep(STEADY_SECONDS)
        return not self._rows()

    def _rows(self) -> list[str]:
        try:
            found = wrong_rows(self.installation)
            found += still_running(self.installation, self._ending)
        except AWAY as error:
            return [f"{type(error).__name__} {error}"]
        found = [row for row in found if row.split()[0] not in self.known.rows]
        self._last = found[0] if found else self._last
        return found

    # Checking -------------------------------------------------------------------------------

    @contextmanager
    def _probing(self) -> Iterator[list[Probe]]:
        """What others ask all the while: the console, the neighbour's sandbox, its proxy."""
        installation = self.installation
        with installation.client(installation.neighbour.key) as client:
            address = f"/v1/sandboxes/{installation.neighbour.sandbox}/exec"

            def run(command: str, expected: str) -> httpx.Response | tuple[str, str]:
                answer = client.post(address, json={"command": command, "timeout_seconds": 20})
                if answer.is_success and expected not in answer.json()["stdout"]:
                    return "unwell", answer.text[:200]
                return answer

            def ready() -> tuple[str, str]:
                answer = client.get("/readyz")
                return ("ok" if answer.is_success else "unwell"), answer.text[:300]

            alive = f"kill -0 {installation.neighbour.inside} && echo alive"
            probes = [
                Probe("list", lambda: client.get("/v1/sandboxes")),
                Probe("neighbour", lambda: run(alive, "alive")),
                Probe("proxy", lambda: run(ASK_PROXY, " 403 ")),
                Probe("ready", ready),
            ]
            try:
                yield probes
            finally:
                for probe in probes:
                    probe.close()

    def _judge(self, answers: list[Answer], probed: list[Answer]) -> None:
        self.told += [f"{one.what} {one.kind}: {one.detail}" for one in answers]
        for answer in answers:
            if not self._may_be_told(answer, own=True):
                self.wrong.append(str(answer))
        bad = [str(one) for one in probed if not self._may_be_told(one, own=False)]
        self.wrong += bad[:MOST_TOLD]

    def _may_be_told(self, answer: Answer, *, own: bool) -> bool:
        """Whether this is an answer that the process's end may cost."""
        breaks = self.process.breaks
        if answer.kind in {"ok", "unwell"}:
            return True
        if answer.kind in {CUT, SILENCE}:
            # Silence is a connection to what hangs; to anything else it is none.
            hangs = answer.kind == SILENCE and self.how is signal.SIGKILL
            return "connections" in breaks and not hangs
        if answer.kind == "wrong":
            return False
        costs = {"build": "builds", "stream": "commands"}.get(answer.what, "calls")
        return costs in breaks or (own and "sandbox" in breaks)

    def _leftovers(self) -> list[str]:
        def left_over() -> list[str]:
            known = self.known.rows
            found = of_the_ended(self.installation)
            return [what for what in found if not any(row in what for row in known)]

        if self._within(scaled(TARGET_SECONDS), lambda: not left_over()):
            return []
        left = left_over()
        more = [f"and {len(left) - MOST_TOLD} more"] if len(left) > MOST_TOLD else []
        return [f"left of what has ended: {what}" for what in left[:MOST_TOLD]] + more

    def _tidy(self) -> None:
        """Delete what the cell made; nothing may be left of it, and nothing else be gone."""
        self.installation.tidy()
        if self._within(scaled(TIDY_SECONDS), lambda: not any(self._changes())):
            return
        more, fewer = self._changes()
        self.wrong += [f"left behind: {what}" for what in sorted(more)][:MOST_TOLD]
        self.wrong += [f"gone: {what}" for what in sorted(fewer)][:MOST_TOLD]
        self.known.left += more

    def _changes(self) -> tuple[Counter[str], Counter[str]]:
        """What is on the host that was not before this cell, and what is not that always was."""
        now, always = holdings(self.installation), self.known.holdings
        return now - always - self.known.left, always - now
