"""What a terminal and a log file see of a start."""

from __future__ import annotations

import io

import pytest

from orkestr_console.runner.display import Display


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_finished_step_is_one_line_with_its_time() -> None:
    stream = io.StringIO()
    with Display(stream).step("database") as step:
        step.detail = "PostgreSQL"
    words = stream.getvalue().split()
    assert words[1:3] == ["database", "PostgreSQL"]
    assert words[-1] == "s"


def test_a_failed_step_prints_no_success() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Display(stream).step("database"):
        raise ValueError("no")
    assert stream.getvalue() == ""


def test_progress_moves_on_a_terminal_and_adds_lines_to_a_log() -> None:
    terminal, log = Terminal(), io.StringIO()
    for stream in (terminal, log):
        display = Display(stream)
        with display.step("base"):
            display.progress("base", "one")
            display.progress("base", "one")
            display.progress("base", "two\nlines")
    assert terminal.getvalue().count("\n") == 1
    assert log.getvalue().count("\n") == 3
    assert "two lines" in log.getvalue()


def test_a_line_is_printed_above_the_moving_one() -> None:
    terminal = Terminal()
    display = Display(terminal)
    display.progress("base", "fetching")
    display.warn("look here")
    shown = terminal.getvalue().split("\n")
    assert shown[0].endswith("look here")
    assert shown[1].endswith("fetching")
