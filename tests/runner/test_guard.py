"""What dies or hangs while the console serves is replaced, the process manager included."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostruntime.host import kernel
from orkestr_console.runner import guard, watch
from orkestr_console.runner.display import Display
from orkestr_console.runner.guard import Guard
from orkestr_console.runner.keeper import Keeper, Program
from orkestr_console.runner.layout import Layout, layout_from
from orkestr_console.runner.watch import Watch, is_running
from tests.programs import BUSY, IDLING, python, running
from tests.stack import wait_for

pytestmark = pytest.mark.host
SOON = 1.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostruntime.host.patience.slowness", lambda: 1.0)
    monkeypatch.setattr(watch, "HUNG_SECONDS", SOON)
    monkeypatch.setattr(watch, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(guard, "ORPHAN_SECONDS", SOON)
    monkeypatch.setattr(guard, "STATES_TIMEOUT", 0.2)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    """An installation whose disk is two megabytes."""
    kernel.mount("orkestr-test", tmp_path, "tmpfs", 0, "size=2m")
    try:
        made = layout_from({"ORKESTR_VAR": str(tmp_path / "var"), "PORT": "1"})
        made.prepare()
        yield made
    finally:
        kernel.umount(tmp_path, kernel.MNT_DETACH)


TALKING = "import time\nwhile True: print('x' * 1000, flush=True), time.sleep(0.01)\n"


@pytest.fixture
def keeper(layout: Layout) -> Iterator[Keeper]:
    dying = ["setpriv", "--pdeathsig=TERM", "--"]
    programs = [
        Program("worker", [*dying, *python(IDLING)], 1),
        Program("talker", [*dying, *python(TALKING)], 2),
    ]
    made = Keeper(layout, programs)
    made.start()
    made.launch("worker")
    wait_for(lambda: made.states()["worker"][0] == "RUNNING", 20)
    yield made
    made.stop()


def guarding(layout: Layout, keeper: Keeper) -> tuple[Guard, io.StringIO]:
    said = io.StringIO()
    return Guard(layout, keeper, Display(said)), said


def look_until(guarded: Guard, reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        guarded.check()
        time.sleep(0.05)


def worker(keeper: Keeper) -> int:
    return keeper.states(20)["worker"][1]


def test_a_stopped_program_is_replaced_and_a_living_one_left_alone(
    layout: Layout, keeper: Keeper
) -> None:
    guarded, said = guarding(layout, keeper)
    first = worker(keeper)
    for _ in range(40):
        guarded.check()
        time.sleep(0.05)
    assert (worker(keeper), said.getvalue()) == (first, "")
    os.kill(first, signal.SIGSTOP)
    look_until(guarded, lambda: worker(keeper) not in {0, first})
    assert not is_running(first)
    assert "worker does not answer: it did nothing for 1 s" in said.getvalue()
    assert "is stopped). It is started again" in said.getvalue()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_manager_that_is_gone_or_hangs_is_replaced_with_all_it_ran(
    layout: Layout, keeper: Keeper, how: signal.Signals
) -> None:
    guarded, said = guarding(layout, keeper)
    first, [manager] = worker(keeper), keeper.manager()
    os.kill(manager, how)
    look_until(guarded, lambda: keeper.manager() != [manager])
    look_until(guarded, lambda: worker(keeper) not in {0, first})
    assert not is_running(first)
    assert "everything is started again" in said.getvalue()


def test_a_program_that_ignores_the_end_of_its_manager_is_killed_before_another_starts(
    layout: Layout, keeper: Keeper
) -> None:
    """Stopped, it never hears of it; and there may be but one."""
    guarded, _ = guarding(layout, keeper)
    first, [manager] = worker(keeper), keeper.manager()
    os.kill(first, signal.SIGSTOP)
    os.kill(manager, signal.SIGKILL)
    look_until(guarded, lambda: keeper.manager() != [manager])
    assert not is_running(first)


def test_a_full_disk_ends_neither_the_manager_nor_its_logs(layout: Layout, keeper: Keeper) -> None:
    """It wrote a traceback to the same disk, and died of that."""
    keeper.launch("talker")
    wait_for(lambda: keeper.states()["talker"][0] == "RUNNING", 20)
    guarded, _ = guarding(layout, keeper)
    [manager] = keeper.manager()
    ballast = layout.var / "ballast"
    with ballast.open("wb", buffering=0) as full, pytest.raises(OSError, match="No space"):
        while True:
            full.write(bytes(4096))
    log = layout.log / "talker.log"
    for _ in range(30):
        guarded.check()
        time.sleep(0.05)
    assert keeper.manager() == [manager]
    assert keeper.alive()
    held = log.stat().st_size
    ballast.unlink()
    look_until(guarded, lambda: log.stat().st_size > held + 10_000)


def test_one_that_works_is_waited_for_longer_than_one_that_does_nothing() -> None:
    """Silent, both of them."""

    def silent_for(program: str) -> float:
        with running(python(program)) as process:
            watched = Watch(lambda: False, lambda: [process.pid])
            began = time.monotonic()
            while not watched.symptom() and time.monotonic() < began + 3 * SOON:
                time.sleep(0.05)
            return time.monotonic() - began

    assert silent_for(IDLING) < 3 * SOON
    assert silent_for(BUSY) >= 3 * SOON


def test_a_question_that_never_returns_holds_nobody_up_and_is_asked_once() -> None:
    asked: list[float] = []

    def never() -> bool:
        asked.append(time.monotonic())
        time.sleep(30)
        return True

    watched = Watch(never, tuple)
    slowest = 0.0
    while not watched.symptom():
        began = time.monotonic()
        watched.symptom()
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.01)
    assert len(asked) == 1
    assert slowest < SOON


def test_what_is_shown_on_a_terminal_that_has_gone_ends_nothing() -> None:
    reader, writer = os.pipe()
    display = Display(os.fdopen(writer, "w"))
    os.close(reader)
    display.line("told to nobody")
    display.progress("base", "told to nobody")
