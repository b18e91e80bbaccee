"""The process manager: what starts, what is said when it does not, and what dies with it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orkestr_console.runner.keeper import Keeper, Program, tail
from orkestr_console.runner.layout import MAX_SOCKET_PATH, Layout, StartError, layout_from
from tests.programs import WORKING
from tests.stack import wait_for

# What is left of a socket's path by the longest that is made in it.
LONGEST_VAR = MAX_SOCKET_PATH - len("/run/supervisor.sock.4194304")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = layout_from({"ORKESTR_VAR": str(tmp_path / "v a r"), "PORT": "1"})
    made.prepare()
    return made


def shell(script: str) -> list[str]:
    return ["setpriv", "--pdeathsig=TERM", "--", "/bin/sh", "-c", script]


@pytest.fixture
def keeper(layout: Layout) -> Iterator[Keeper]:
    up = shlex.quote(str(layout.run / "up"))
    working = layout.run / "working.py"
    working.write_text(WORKING)
    slowly = shlex.join([sys.executable, str(working), "8"])
    programs = [
        Program("steady", shell(f"echo up > {up}; sleep 60"), 1),
        Program("broken", shell("echo 100% of no use; exit 3"), 2),
        Program("slow", shell(f"{slowly}; echo up > {up}; sleep 60"), 3),
        Program("hung", shell("echo last words; exec sleep 60"), 4),
        Program("busy", shell("while :; do :; done"), 5),
        Program("late", shell("sleep 1.2; exit 3"), 6),
    ]
    made = Keeper(layout, programs)
    made.start()
    yield made
    made.stop()
    assert not made.alive()


def is_up(layout: Layout) -> bool:
    return (layout.run / "up").exists()


def test_a_program_runs_once_it_says_so(keeper: Keeper, layout: Layout) -> None:
    assert keeper.states()["steady"] == ("STOPPED", 0)
    keeper.launch("steady")
    keeper.await_ready("steady", lambda: is_up(layout), 10)
    assert keeper.states()["steady"][1] > 0


def test_a_program_that_crashes_is_given_up_on_with_its_own_words(keeper: Keeper) -> None:
    keeper.launch("broken")
    with pytest.raises(StartError, match=r"broken crashed as it started(.|\n)*100% of no use"):
        keeper.await_ready("broken", lambda: False, 30)


def test_a_program_that_runs_for_a_while_before_it_crashes_is_given_up_on(keeper: Keeper) -> None:
    """supervisord takes it for one that runs, and starts it again at once, for ever."""
    keeper.launch("late")
    with pytest.raises(StartError, match="late crashed as it started"):
        keeper.await_ready("late", lambda: False, 30)


def test_a_program_that_is_slow_is_waited_for(
    keeper: Keeper, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orkestr_console.runner.keeper.REPORT_SECONDS", 0.5)
    told: list[str] = []
    keeper.launch("slow")
    keeper.await_ready("slow", lambda: is_up(layout), 0.8, told.append)
    assert len(told) >= 2
    assert re.fullmatch(r"waiting for slow, at work for \d+ s", told[-1])


def test_a_program_that_does_nothing_is_given_up_on(keeper: Keeper) -> None:
    keeper.launch("hung")
    seen = r"hung is not ready: it did nothing for 0\.8 s \(sleep \(\d+\) sleeps\)(.|\n)*last words"
    with pytest.raises(StartError, match=seen):
        keeper.await_ready("hung", lambda: False, 0.8)


def test_a_program_that_is_busy_for_ever_is_given_up_on(
    keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostruntime.host.patience.slowness", lambda: 1.0)
    keeper.launch("busy")
    with pytest.raises(StartError, match="busy is not ready: it was still at work after"):
        keeper.await_ready("busy", lambda: False, 0.3)


def test_a_manager_that_takes_its_time_to_start_and_to_stop_is_waited_for(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports a lot: on a machine twenty times slower it is at work for longer than this."""
    monkeypatch.setattr("orkestr_console.runner.keeper.START_SECONDS", 0.4)
    monkeypatch.setattr("orkestr_console.runner.keeper.STOP_SECONDS", 2.0)
    made = Keeper(layout, [Program("steady", shell("sleep 60"), 1)])
    made.start()
    made.launch("steady")
    wait_for(lambda: bool(made.pids()), 10)
    made.stop()
    assert not made.alive()
    assert made.pids() == []


def test_a_manager_starts_in_the_longest_path_that_is_accepted(tmp_path: Path) -> None:
    def layout_of(size: int) -> Layout:
        return layout_from({"ORKESTR_VAR": f"{tmp_path}/{'x' * (size - len(str(tmp_path)) - 1)}"})

    with pytest.raises(StartError, match="too long a path"):
        layout_of(LONGEST_VAR + 1).prepare()
    layout = layout_of(LONGEST_VAR)
    layout.prepare()
    made = Keeper(layout, [Program("steady", shell("sleep 60"), 1)])
    made.start()
    made.stop()
    assert not made.alive()


def test_a_killed_program_is_started_again(keeper: Keeper, layout: Layout) -> None:
    keeper.launch("steady")
    wait_for(lambda: keeper.states()["steady"][0] == "RUNNING", 10)
    first = keeper.states()["steady"][1]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: keeper.states()["steady"][1] not in {0, first}, 10)


def test_stopping_ends_its_programs(keeper: Keeper) -> None:
    keeper.launch("steady")
    wait_for(lambda: keeper.states()["steady"][1] > 0, 10)
    program = keeper.states()["steady"][1]
    keeper.stop()
    assert not Path(f"/proc/{program}").exists()


def test_programs_do_not_outlive_a_manager_killed_outright(keeper: Keeper, layout: Layout) -> None:
    keeper.launch("steady")
    # Up: from then on it has asked the kernel to be ended with its parent.
    wait_for(lambda: is_up(layout), 10)
    program = keeper.states()["steady"][1]
    os.kill(int((layout.run / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: ended(program), 10)
    wait_for(lambda: not keeper.alive(), 10)


def ended(process: int) -> bool:
    """Whether it is gone, or dead and only waiting to be collected."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True


def test_a_tail_starts_after_what_was_there_before(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n")
    seen = log.stat().st_size
    with log.open("a") as stream:
        stream.writelines(f"line {number}\n" for number in range(30))
    assert tail(log, seen).splitlines() == [f"    line {number}" for number in range(10, 30)]
    assert tail(tmp_path / "none") == "    (it wrote nothing)"
