"""Lanes of checks: they run beside each other, each is heard whole, and none is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lanes import TREE, Check, Lane, Room, Verdicts
from tests.verify import ALONE, APART, LIVE, quick_paths

# Says so, and ends when the other one has said so as well.
MEETING = """
import pathlib, sys, time
own, other = (pathlib.Path(name) for name in sys.argv[1:])
print(f"{own.name} is here", flush=True)
own.touch()
while not other.exists():
    time.sleep(0.02)
print(f"{own.name} has met {other.name}")
"""


def lane(directory: Path, *checks: Check) -> Lane:
    directory.mkdir()
    return Lane(Room(directory, os.environ), checks)


def script(name: str, text: str, *arguments: str) -> Check:
    return Check(name, ["-c", text, *arguments])


def meeting(place: Path, own: str, other: str) -> Check:
    return script(own, MEETING, str(place / own), str(place / other))


def test_lanes_run_beside_each_other_and_are_heard_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lanes = [
        lane(tmp_path / "one", meeting(tmp_path, "a", "b")),
        lane(tmp_path / "two", meeting(tmp_path, "b", "a")),
    ]
    verdicts = Verdicts()
    verdicts.run_beside(lanes)
    assert verdicts.failed == []
    said = capsys.readouterr().out
    for own, other in (("a", "b"), ("b", "a")):
        assert f"== {own}\n{own} is here\n{own} has met {other}\n-- {own}: ok" in said


def test_what_fails_is_said_and_keeps_nothing_else_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = script("bad", "import sys; sys.exit('it is broken')")
    lanes = [lane(tmp_path / "one", bad, script("next", "print('ran')")), lane(tmp_path / "two")]
    verdicts = Verdicts()
    verdicts.run_beside(lanes)
    assert verdicts.failed == ["bad"]
    said = capsys.readouterr().out
    assert "== bad\nit is broken\n-- bad: failed" in said
    assert "== next\nran\n-- next: ok" in said


def test_lanes_run_one_after_the_other_within(tmp_path: Path) -> None:
    written = tmp_path / "written"
    note = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    checks = [script(word, note, str(written), word) for word in "abc"]
    Verdicts().run_beside([lane(tmp_path / "one", *checks)])
    assert written.read_text() == "abc"


def places(names: Sequence[str]) -> set[Path]:
    return {TREE / "tests" / name for name in names}


def test_every_test_is_in_one_part() -> None:
    parts = [{TREE / path for path in quick_paths()}, places(["host"]), places(LIVE)]
    found = (TREE / "tests").rglob("test_*.py")
    for file in (file for file in found if not {*file.parents} & places(APART)):
        holding = [part for part in parts if part & {file, *file.parents}]
        assert len(holding) == 1, file


def test_what_runs_alone_is_there_and_a_host_test() -> None:
    """Which is where it is left out of what runs beside others."""
    for path in ALONE:
        assert (TREE / path).is_file()
        assert path.startswith("tests/host/")
