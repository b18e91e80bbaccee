"""Everything that must hold before a change lands: `make test` and CI run this.

Style, types and migrations; all of pytest, in sessions of which three run at once (tests/lanes.py);
of the host runtime's tests those marked `pythons` again, on the other Python that the project
supports, where bootstrap.sh found one; last and alone, the tests that measure the machine.
`--only pythons` runs all of the host runtime's on each.

The databases and installations that the tests use are made in one scratch directory, and nothing of
them may be left on the host.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orkestr_console.runner.account import ensure_user
from orkestr_console.runner.postgres import temporary_cluster
from tests.lanes import TREE, Check, Room, Verdicts, report
from tests.leftovers import host_names, leftovers

TESTS = TREE / "tests"
# The sessions of pytest; the first ones take longest. Any other test is quick.
PARTS = {
    "host tests": ("host",),
    "live tests": ("clients", "browser"),
    "runtime tests": ("hostruntime", "runner"),
}
QUICK = "quick tests"
# What these measure or count is the machine's, not theirs alone; what they take is, too.
RUN_ALONE = ("tests/host/test_hogs.py", "tests/host/test_reserve.py")
# By commands of their own: `make bench`, `make faults`, `make recipes`, `make test-vm`.
SEPARATE = ("benchmarks", "faults", "recipes", "vm")
# What differs from one Python to the next is the runtime that forks, clones and enters.
RUNTIME = ("tests/hostruntime", "tests/host")
OTHER_PYTHON = TREE / ".venv-other/bin/python"
LANES = ("1", "2", "3")
SCRATCH_PREFIX = "orkestr-test-"
STATIC = (
    Check("ruff check", ["-m", "ruff", "check", "."]),
    Check("ruff format", ["-m", "ruff", "format", "--check", "."]),
    Check("mypy", ["-m", "mypy", "."]),
    Check("templates", ["-m", "tests.template_lint"]),
)
MIGRATIONS = Check("migrations", ["manage.py", "makemigrations", "--check", "--dry-run"])


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when everything holds and nothing is left behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.verify")
    parser.add_argument("--only", choices=["static", "tests", "pythons"])
    parser.add_argument("paths", nargs="*", help="give pytest these instead of everything")
    options = parser.parse_args(argv)
    if options.only == "static":
        verdicts = Verdicts()
        for check in STATIC:
            verdicts.run(check, Room(TREE, os.environ))
        return conclude(verdicts)
    if options.only == "pythons":
        return verify(pythons)
    if options.only == "tests" and options.paths:
        return verify(lambda verdicts, scratch: run_paths(verdicts, scratch, options.paths))
    static = () if options.only == "tests" else (*STATIC, MIGRATIONS)
    return verify(lambda verdicts, scratch: run_all(verdicts, scratch, static))


def run_all(verdicts: Verdicts, scratch: Path, static: Sequence[Check]) -> None:
    """All that must hold: three checks at once, and then what runs alone."""
    first, *others = (pytest(name, paths) for name, paths in parts().items())
    # It has the agent's state directory to itself.
    other = on_the_other_python(["-m", "pythons", *RUNTIME, *_without(RUN_ALONE)], first.name)
    shared = {"ORKESTR_TEST_BASES": str(scratch / "bases")}
    with ExitStack() as stack:
        # Most of what the longest two do is to wait.
        rooms = [stack.enter_context(room(scratch, name, **shared)) for name in LANES]
        verdicts.run_parallel([first, *static, *others, *other], rooms)
        # Some make a disk end; where another installation starts, its namespaces would keep it.
        verdicts.run(pytest("tests that run alone", RUN_ALONE, own_mounts=True), rooms[0])


def pythons(verdicts: Verdicts, scratch: Path) -> None:
    """The whole of the host runtime's tests on each Python there is."""
    with room(scratch, "1") as one:
        for check in (pytest("host runtime's tests", RUNTIME), *on_the_other_python(RUNTIME)):
            verdicts.run(check, one)


def run_paths(verdicts: Verdicts, scratch: Path, paths: Sequence[str]) -> None:
    """The tests of ``paths``."""
    with room(scratch, "1") as one:
        verdicts.run(pytest("tests", paths), one)


def parts() -> dict[str, list[str]]:
    """What each session of pytest is given."""
    named = {name for names in PARTS.values() for name in names}
    quick = [
        path.name
        for path in sorted(TESTS.iterdir())
        if path.name not in {*named, *SEPARATE, "__pycache__"}
        and (path.is_dir() or path.name.startswith("test_"))
    ]
    return {
        part: [*(f"tests/{name}" for name in names), *_without(RUN_ALONE)]
        for part, names in (PARTS | {QUICK: quick}).items()
    }


def _without(paths: Sequence[str]) -> list[str]:
    return [f"--ignore={path}" for path in paths]


def pytest(name: str, arguments: Sequence[str], **more: Any) -> Check:
    """A session of pytest's."""
    # After ten failures the cause is among them, and what follows would hide it. Short, as rooms'
    # names are: sockets are made in it, of whose path 107 bytes are all there may be (unix(7)).
    reporting = ["--tb=short", "--maxfail=10", "--basetemp={room}/t"]
    return Check(f"pytest, {name}", ["-m", "pytest", *reporting, *arguments], **more)


def on_the_other_python(arguments: Sequence[str], *after: str) -> list[Check]:
    """Tests on the Python that this one is not; without one it is said that they are not run."""
    if not OTHER_PYTHON.exists():
        report("== pytest on another Python: NOT RUN, for want of one (`make test` says why)")
        return []
    asked = [str(OTHER_PYTHON), "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    more = {"python": str(OTHER_PYTHON), "after": frozenset(after)}
    return [pytest(f"Python {version}", arguments, **more)]


def verify(checks: Callable[[Verdicts, Path], None]) -> int:
    """Run checks with a scratch directory of their own."""
    before = host_names()
    ensure_user()
    verdicts = Verdicts()
    with scratch_directory() as scratch:
        checks(verdicts, scratch)
        left = leftovers(scratch, before)
    for name in left:
        report(f"left behind: {name}")
    verdicts.failed += ["leftovers"] if left else []
    return conclude(verdicts)


@contextmanager
def room(scratch: Path, name: str, **more: str) -> Iterator[Room]:
    """A room in the scratch directory, with a database server of its own."""
    directory = scratch / name
    directory.mkdir(mode=0o755)
    with temporary_cluster(directory / "postgres") as cluster:
        yield Room(directory, {**environment(directory, cluster.url), **more})


def environment(scratch: Path, database_url: str, tree: Path = TREE) -> dict[str, str]:
    """The operator's environment, pointed away from any installation of theirs."""
    own = {
        "DATABASE_URL": database_url,
        "ORKESTR_VAR": str(scratch / "var"),
        "ORKESTR_TEST_DIRECTORY": str(scratch),
        "PYTHONUNBUFFERED": "1",
        "HOME": os.environ.get("HOME") or "/root",
    }
    inherited = {name: value for name, value in os.environ.items() if name not in {"PORT"}}
    return {**inherited, **own, **caches(scratch, tree)}


def caches(scratch: Path, tree: Path) -> dict[str, str]:
    """What keeps the tools' caches out of a clone that is not root's; nothing where it is."""
    if os.geteuid() == tree.stat().st_uid:
        return {}
    return {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": f"-o cache_dir={scratch}/pytest-cache",
        "MYPY_CACHE_DIR": str(scratch / "mypy"),
        "RUFF_CACHE_DIR": str(scratch / "ruff"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
    }


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for everything the run makes; what a killed run left is removed first."""
    base = Path(os.environ.get("ORKESTR_TEST_BASE", "/var/tmp"))
    for stale in base.glob(f"{SCRATCH_PREFIX}*"):
        pid = stale.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            remove(stale)
    # Short, as sockets are made in it. What a run of the same number left may still be mounted.
    names = (f"{SCRATCH_PREFIX}{os.getpid()}-{attempt}" for attempt in range(10))
    directory = next(base / name for name in names if not (base / name).exists())
    directory.mkdir()
    # PostgreSQL and the web process run as users of their own.
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        remove(directory)


def remove(directory: Path) -> None:
    """Delete a scratch directory, after the host runtime has let go of state directories in it."""
    # A few levels down and no further: image trees hold a hundred thousand files.
    for record in sorted(
        record for depth in range(1, 7) for record in directory.glob("*/" * depth + "instance.json")
    ):
        state = record.parent
        command = [sys.executable, "-m", "hostruntime.agent", "--state-dir", str(state)]
        subprocess.run([*command, "--socket", str(state / "sock"), "teardown"], cwd=TREE)
    mounted = [name for name in leftovers(directory) if name.startswith("mount ")]
    if mounted:
        report(f"not removing {directory}: {', '.join(mounted)}")
        return
    shutil.rmtree(directory)


def conclude(verdicts: Verdicts) -> int:
    """The last lines: what failed, or that nothing did."""
    if verdicts.failed:
        for line in verdicts.excerpts:
            report(line)
        report(f"FAILED: {', '.join(verdicts.failed)}")
        return 1
    report("Everything holds.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
