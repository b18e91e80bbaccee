"""The process manager: what starts, what is said when it does not, and what dies with it."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orkestr_console.runner.keeper import Keeper, Program, tail
from orkestr_console.runner.layout import Layout, StartError, layout_from
from tests.stack import wait_for


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = layout_from({"ORKESTR_VAR": str(tmp_path / "v a r"), "PORT": "1"})
    made.prepare()
    return made


def shell(script: str) -> list[str]:
    return ["setpriv", "--pdeathsig=TERM", "--", "/bin/sh", "-c", script]


@pytest.fixture
def keeper(layout: Layout) -> Iterator[Keeper]:
    programs = [
        Program("steady", shell(f"echo up > {shlex.quote(str(layout.run / 'up'))}; sleep 60"), 1),
        Program("broken", shell("echo 100% of no use; exit 3"), 2),
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
