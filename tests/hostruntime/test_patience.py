"""What is at work is waited for, however slow; what hangs is given up on, and named."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostruntime.host import patience as module
from hostruntime.host.patience import (
    MAX_SLOWNESS,
    Patience,
    configured_slowness,
    process_tree,
    scaled,
    slowness,
)
from hostruntime.host.run import CommandFailed, run, spawn, wait_or_kill
from tests.programs import BUSY, IDLING, WORKING, python, running
from tests.stack import wait_for


@pytest.fixture(autouse=True)
def as_on_an_ordinary_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings are ten times the limit, whatever this machine is."""
    monkeypatch.setenv("ORKESTR_PATIENCE", "1")
    slowness.cache_clear()
    yield
    slowness.cache_clear()


# Programs that are run ------------------------------------------------------------------------


def test_a_program_that_works_is_waited_for() -> None:
    began = time.monotonic()
    assert run(python(WORKING, 6), timeout=0.8).text == "done\n"
    assert time.monotonic() - began > 2 * 0.8


def test_so_is_one_whose_child_works() -> None:
    words = " ".join(f"'{word}'" for word in python(WORKING, 6))
    assert run(["/bin/sh", "-c", f"{words}; exit 0"], timeout=0.8).text == "done\n"


def test_so_is_one_that_moves_data(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb', 0) as file:\n"
        "    for _ in range(20): file.write(bytes(4096)); time.sleep(0.1)\n"
        "print('done')"
    )
    assert run(python(program, f"{tmp_path}/file"), timeout=0.6).text == "done\n"


@pytest.mark.parametrize(
    ("argv", "seen"),
    [
        (["sleep", "600"], r"did nothing for 0.5 s \(sleep \(\d+\) sleeps\)"),
        (["/bin/sh", "-c", "kill -STOP $$"], r"did nothing for 0.5 s \(sh \(\d+\) is stopped\)"),
        (python(IDLING), r"did nothing for 0.5 s"),
    ],
    ids=["sleeps", "is stopped", "wakes to no purpose"],
)
def test_a_program_that_hangs_is_given_up_on_and_named(argv: list[str], seen: str) -> None:
    with pytest.raises(CommandFailed, match=seen):
        run(argv, timeout=0.5)


def test_a_program_that_hangs_before_it_reads_is_given_up_on() -> None:
    with pytest.raises(CommandFailed, match="did nothing"):
        run(["sleep", "600"], input=bytes(1024 * 1024), timeout=0.5)


def test_a_program_that_is_busy_for_ever_is_given_up_on_at_the_ceiling() -> None:
    began = time.monotonic()
    with pytest.raises(CommandFailed, match="was still at work after"):
        run(python(BUSY), timeout=0.2)
    assert time.monotonic() - began >= 10 * 0.2


def test_a_program_that_was_asked_to_end_may_take_its_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = spawn(python(WORKING, 6), log=log)
    wait_or_kill(process, 0.8)
    assert (process.returncode, log.read_text()) == (0, "done\n")
    hung = spawn(["sleep", "600"], log=log)
    wait_or_kill(hung, 0.5)
    assert hung.returncode == -signal.SIGKILL


def test_a_program_that_wants_the_cpu_and_is_not_given_it_does_not_hang() -> None:
    with starved(python(BUSY)) as pid:
        patience = Patience(0.5, lambda: [pid])
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert not patience.exhausted(), patience.reason
            time.sleep(0.02)


class starved:  # noqa: N801 - used as a function
    """A process that gets next to nothing of one CPU, which another one uses up (sched(7))."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._opened = ExitStack()

    def __enter__(self) -> int:
        cpu = min(os.sched_getaffinity(0))
        hog = self._opened.enter_context(running(python(BUSY)))
        os.sched_setaffinity(hog.pid, {cpu})
        process = self._opened.enter_context(
            running(["taskset", "-c", str(cpu), "chrt", "--idle", "0", *self._argv])
        )
        return process.pid

    def __exit__(self, *_: object) -> None:
        self._opened.close()


# Waiting in an event loop ---------------------------------------------------------------------


def test_an_event_loop_waits_for_what_works() -> None:
    async def wait(argv: list[str], seconds: float) -> int:
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
        patience = Patience(seconds, lambda: process_tree(process.pid))
        try:
            async with patience:
                return await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
            assert "did nothing" in patience.reason
            raise

    assert asyncio.run(wait(python(WORKING, 6), 0.8)) == 0
    with pytest.raises(TimeoutError):
        asyncio.run(wait(["sleep", "600"], 0.5))


def test_any_sign_of_progress_will_do() -> None:
    steps = iter(range(4))
    patience = Patience(0.4, marker=lambda: next(steps, None))
    began = time.monotonic()
    wait_for(patience.exhausted, 30)
    # Four steps, each seen at a look, and then nothing for as long as it may take.
    assert time.monotonic() - began > 3 * patience.poll_interval + 0.4


def test_a_look_that_comes_late_does_not_count_in_full() -> None:
    with running(["sleep", "600"]) as process:
        patience = Patience(3.0, lambda: [process.pid])
        # As of a machine that was suspended.
        patience._last_check -= 3600
        assert not patience.exhausted()


# How slow the machine is ----------------------------------------------------------------------


def test_a_limit_that_cannot_follow_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaled(5) == 5
    monkeypatch.setenv("ORKESTR_PATIENCE", "2.5")
    slowness.cache_clear()
    assert scaled(4) == 10


def test_measuring_is_quick_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORKESTR_PATIENCE")
    slowness.cache_clear()
    before = time.thread_time()
    assert 1 <= slowness() <= MAX_SLOWNESS
    assert time.thread_time() - before < 0.03
    monkeypatch.setattr(module, "_REFERENCE_SECONDS", 1e-9)
    slowness.cache_clear()
    assert slowness() == MAX_SLOWNESS


def test_a_process_that_is_not_given_the_cpu_knows_it() -> None:
    """Beside a hog it gets half a CPU; less where its weight counts beyond its session.

    Between sessions it does not: "The autogroup feature" in sched(7).
    """
    code = (
        "from hostruntime.host.patience import _contention; sum(range(10**7)); print(_contention())"
    )
    cpu = str(min(os.sched_getaffinity(0)))
    with running(["taskset", "-c", cpu, *python(BUSY)]):
        argv = ["taskset", "-c", cpu, "nice", "-n", "5", sys.executable, "-c", code]
        said = run(argv, timeout=60, cwd=Path(module.__file__).parents[2]).text
    assert float(said) > 1.3


@pytest.mark.parametrize("text", ["slow", "0", "-3", "nan", "1e9"])
def test_a_setting_that_is_none_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="give a number from 1 to 1000"):
        configured_slowness({"ORKESTR_PATIENCE": text})


def test_a_tree_has_the_children_of_every_thread() -> None:
    program = (
        "import subprocess, threading\n"
        "start = lambda: subprocess.Popen(['sleep', '600']).wait()\n"
        "threading.Thread(target=start, daemon=True).start()\n"
        "start()"
    )
    with running(python(program)) as process:
        try:
            wait_for(lambda: len(process_tree(process.pid)) == 3, 30)
        finally:
            for pid in process_tree(process.pid)[1:]:
                os.kill(pid, signal.SIGKILL)
    assert process_tree(process.pid) == []
