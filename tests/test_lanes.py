"""Lanes of checks: they run beside each other, each is heard whole, and none is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orkestr_console.runner.layout import MAX_PID
from tests.lanes import EXCERPT_LINES, TREE, Check, Room, Verdicts
from tests.runner.test_keeper import LONGEST_VAR
from tests.verify import RUN_ALONE, SCRATCH_PREFIX, SEPARATE, conclude, parts

# Says so, and ends when the other one has said so as well.
MEETING = """
import pathlib, sys, time
own, other = (pathlib.Path(name) for name in sys.argv[1:])
print(f"{own.name} is here", flush=True)
own.touch()
until = time.monotonic() + 300
while not other.exists():
    assert time.monotonic() < until, f"{other.name} does not come"
    time.sleep(0.02)
print(f"{own.name} has met {other.name}")
"""


def rooms(place: Path, count: int = 2) -> list[Room]:
    made = [place / str(number) for number in range(count)]
    for directory in made:
        directory.mkdir()
    return [Room(directory, os.environ) for directory in made]


def script(name: str, text: str, *arguments: str, after: str = "") -> Check:
    return Check(name, ["-c", text, *arguments], after=frozenset([after] if after else []))


def meeting(place: Path, own: str, other: str) -> Check:
    return script(own, MEETING, str(place / own), str(place / other))


def test_two_run_at_once_and_are_heard_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")]
    verdicts = Verdicts()
    verdicts.run_parallel(checks, rooms(tmp_path))
    assert verdicts.failed == []
    said = capsys.readouterr().out
    for own, other in (("a", "b"), ("b", "a")):
        assert f"== {own}\n{own} is here\n{own} has met {other}\n-- {own}: ok" in said


def test_what_fails_is_said_and_keeps_nothing_else_from_running(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = script("bad", "import sys; sys.exit('it is broken')")
    verdicts = Verdicts()
    verdicts.run_parallel([bad, script("next", "print('ran')", after="bad")], rooms(tmp_path))
    assert verdicts.failed == ["bad"]
    said = capsys.readouterr().out
    assert "== bad\nit is broken\n-- bad: failed" in said
    assert "== next\nran\n-- next: ok" in said


def test_the_end_of_a_run_names_the_tests_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where only the end of what a run said is kept, the cause would be lost."""
    module = tmp_path / "test_it.py"
    module.write_text("def test_this():\n    assert 1 + 1 == 3\n\n\ndef test_that():\n    pass\n")
    session = Check("session", ["-m", "pytest", "-p", "no:cacheprovider", str(module)])
    many = script("many", "print('E   it is broken\\n' * 1000); raise SystemExit(1)")
    verdicts = Verdicts()
    verdicts.run_parallel([session, many], rooms(tmp_path, 1))
    capsys.readouterr()
    assert conclude(verdicts) == 1
    *excerpt, last = capsys.readouterr().out.splitlines()
    assert last == "FAILED: session, many"
    assert "E       assert (1 + 1) == 3" in excerpt
    assert any(line.startswith("FAILED ") and "::test_this" in line for line in excerpt)
    assert not any("::test_that" in line for line in excerpt)
    assert excerpt.count("E   it is broken") == EXCERPT_LINES


NOTE = """
import sys, time
time.sleep(float(sys.argv[3]))
with open(sys.argv[1], "a") as written:
    written.write(sys.argv[2])
"""


def test_what_comes_after_another_waits_for_it_and_the_rest_does_not(tmp_path: Path) -> None:
    written = str(tmp_path / "written")
    checks = [
        script("first", NOTE, written, "1", "0.5"),
        script("second", NOTE, written, "2", "0", after="first"),
        meeting(tmp_path, "a", "b"),
        script("free", "import sys; open(sys.argv[1], 'x')", str(tmp_path / "b")),
    ]
    # The meeting would never end if what is free waited as well.
    Verdicts().run_parallel(checks, rooms(tmp_path, 3))
    assert Path(written).read_text() == "12"


def test_a_check_knows_its_room(tmp_path: Path) -> None:
    (only,) = rooms(tmp_path, 1)
    made = "import sys; open(sys.argv[1], 'x')"
    Verdicts().run_parallel([script("it", made, "{room}/here")], [only])
    assert (only.directory / "here").exists()


def test_every_test_is_in_one_session() -> None:
    """But for the commands of their own, and what runs alone."""
    apart = {TREE / "tests" / name for name in SEPARATE}
    sessions = [{TREE / path for path in paths} for paths in parts().values()]
    for file in (TREE / "tests").rglob("test_*.py"):
        if not apart & {*file.parents}:
            holding = [session for session in sessions if session & {file, *file.parents}]
            assert len(holding) == 1, file


def test_what_runs_alone_is_there_and_left_out_of_the_rest() -> None:
    for path in RUN_ALONE:
        assert (TREE / path).is_file()
        assert all(f"--ignore={path}" in paths for paths in parts().values())


def test_a_test_has_room_for_an_installation_on_a_machine_of_many_processes() -> None:
    """Its name is cut at 30 characters by pytest, and numbered; sockets have to fit below that."""
    longest = f"/var/tmp/{SCRATCH_PREFIX}{MAX_PID}-0/2/t/{'x' * 31}/v a r"
    assert len(longest) <= LONGEST_VAR
