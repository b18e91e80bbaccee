"""Everything that must hold before a change lands: `make test` and CI run this.

Style, types and migrations first, then all of pytest in one session: the quick tests, the ones
that need real LXC, the official clients, the browser. The databases and installations that the
tests use are made in one scratch directory, and nothing of them may be left on the host.

Then the host runtime's tests marked `pythons` again, on the other Python that the project supports,
where bootstrap.sh found one; `--only pythons` runs all of the host runtime's on each.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from orkestr_console.runner.account import ensure_user
from orkestr_console.runner.postgres import temporary_cluster
from tests.leftovers import host_names, leftovers

TREE = Path(__file__).resolve().parents[1]
TESTS = TREE / "tests"
# Last, and in this order: each needs more of the machine than the one before.
HEAVY = ("host", "clients", "browser")
# By commands of their own: `make bench`, `make faults`, `make recipes`, `make test-vm`.
APART = ("benchmarks", "faults", "recipes", "vm")
# What differs from one Python to the next is the runtime that forks, clones and enters.
RUNTIME = ("tests/hostruntime", "tests/host")
OTHER = TREE / ".venv-other/bin/python"
SCRATCH_PREFIX = "orkestr-test-"
STATIC: dict[str, list[str]] = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy": ["-m", "mypy", "."],
}
MIGRATIONS = ["manage.py", "makemigrations", "--check", "--dry-run"]


@dataclass
class Verdicts:
    """What was run and whether it passed."""

    environment: dict[str, str]
    failed: list[str] = field(default_factory=list)

    def run(self, name: str, arguments: Sequence[str], python: str = sys.executable) -> None:
        """Run one check with a Python, this one if none is named, its output straight to ours."""
        say(f"== {name}")
        began = time.monotonic()
        done = subprocess.run(
            [python, *arguments],
            cwd=TREE,
            env=self.environment,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode != 0:
            self.failed.append(name)
        say(f"-- {name}: {'failed' if done.returncode else 'ok'}, {time.monotonic() - began:.1f} s")


def say(line: str) -> None:
    """Print at once: the checks write to the same terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    """Exit status 0 when everything holds and nothing is left behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.verify")
    parser.add_argument("--only", choices=["static", "tests", "pythons"])
    parser.add_argument("paths", nargs="*", help="give pytest these instead of everything")
    options = parser.parse_args(argv)
    if options.only == "static":
        verdicts = Verdicts(dict(os.environ))
        for name, arguments in STATIC.items():
            verdicts.run(name, arguments)
        return conclude(verdicts)
    if options.only == "pythons":
        return verify(pythons)
    if options.only == "tests":
        return verify(lambda verdicts, scratch: tests(verdicts, scratch, options.paths))
    return verify(everything)


def everything(verdicts: Verdicts, scratch: Path) -> None:
    """All that must hold, the quickest to say no first."""
    for name, arguments in (STATIC | {"migrations": MIGRATIONS}).items():
        verdicts.run(name, arguments)
    tests(verdicts, scratch)
    on_the_other_python(verdicts, scratch, "-m", "pythons", *RUNTIME)


def pythons(verdicts: Verdicts, scratch: Path) -> None:
    """The whole of the host runtime's tests on each Python there is."""
    tests(verdicts, scratch, RUNTIME)
    on_the_other_python(verdicts, scratch, *RUNTIME)


def tests(verdicts: Verdicts, scratch: Path, paths: Sequence[str] = ()) -> None:
    """All tests, or those of ``paths``."""
    verdicts.run("pytest", pytest_arguments(scratch, paths))


def on_the_other_python(verdicts: Verdicts, scratch: Path, *arguments: str) -> None:
    """Tests on the Python that this one is not; without one they are said not to have been run."""
    if not OTHER.exists():
        say("== pytest on another Python: NOT RUN, for want of one (`make test` says why)")
        return
    asked = [str(OTHER), "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    verdicts.run(f"pytest on Python {version}", pytest_arguments(scratch, arguments), str(OTHER))


def verify(checks: Callable[[Verdicts, Path], None]) -> int:
    """Run checks against a database and scratch directory of their own."""
    before = host_names()
    ensure_user()
    with scratch_directory() as scratch:
        with temporary_cluster(scratch / "postgres") as cluster:
            verdicts = Verdicts(environment(scratch, cluster.url))
            checks(verdicts, scratch)
        left = leftovers(scratch, before)
    for name in left:
        say(f"left behind: {name}")
    verdicts.failed += ["leftovers"] if left else []
    return conclude(verdicts)


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


def pytest_arguments(scratch: Path, paths: Sequence[str]) -> list[str]:
    """The quick directories first, in one session with the heavy ones."""
    quick = sorted(
        str(path.relative_to(TREE))
        for path in TESTS.iterdir()
        if path.name not in {*HEAVY, *APART, "fakes", "__pycache__"}
        and (path.is_dir() or path.name.startswith("test_"))
    )
    heavy = [f"tests/{name}" for name in HEAVY if (TESTS / name).is_dir()]
    # After ten failures the cause is among them, and what follows would hide it.
    reporting = ["--tb=short", "--maxfail=10", f"--basetemp={scratch}/pytest"]
    return ["-m", "pytest", *reporting, *(paths or [*quick, *heavy])]


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for everything the run makes; what a killed run left is removed first."""
    base = Path(os.environ.get("ORKESTR_TEST_BASE", "/var/tmp"))
    for stale in base.glob(f"{SCRATCH_PREFIX}*"):
        pid = stale.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            remove(stale)
    directory = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", dir=base))
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
        record for depth in range(1, 6) for record in directory.glob("*/" * depth + "instance.json")
    ):
        state = record.parent
        command = [sys.executable, "-m", "hostruntime.agent", "--state-dir", str(state)]
        subprocess.run([*command, "--socket", str(state / "sock"), "teardown"], cwd=TREE)
    mounted = [name for name in leftovers(directory) if name.startswith("mount ")]
    if mounted:
        say(f"not removing {directory}: {', '.join(mounted)}")
        return
    shutil.rmtree(directory)


def conclude(verdicts: Verdicts) -> int:
    """The last lines: what failed, or that nothing did."""
    if verdicts.failed:
        say(f"FAILED: {', '.join(verdicts.failed)}")
        return 1
    say("Everything holds.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
