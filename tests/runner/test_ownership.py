"""Root works in a clone that is somebody else's, and leaves nothing there that is root's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orkestr_console.runner.layout import TREE
from tests.verify import environment

SOMEBODY = 54_321
START = [sys.executable, "-c", "import hostruntime.network.policy"]
SOURCES = ("hostruntime", "orkestr_console", "sandboxes_app", "templates_app")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Somebody's clone, in which nothing has been compiled yet."""
    for name in SOURCES:
        shutil.copytree(
            TREE / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns("__pycache__"),
            symlinks=True,
        )
    shutil.copy(TREE / "manage.py", tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.lchown(path, SOMEBODY, SOMEBODY)
    return tmp_path


def roots(clone: Path) -> list[str]:
    return [str(path) for path in clone.rglob("*") if path.lstat().st_uid == 0]


def as_root(clone: Path, var: Path, *argv: str) -> None:
    """One of manage.py's commands, with bytecode as is usual."""
    own = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "manage.py", *argv],
        cwd=clone,
        env=own | {"ORKESTR_VAR": str(var)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_operators_commands_write_no_bytecode_as_root(
    clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    var = tmp_path_factory.mktemp("var")
    as_root(clone, var, "help")
    # Nor does what they start, such as the agent.
    as_root(clone, var, "shell", "-c", f"import subprocess\nsubprocess.run({START!r}, check=True)")
    assert roots(clone) == []


def test_in_ones_own_clone_python_compiles_as_usual(
    clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for path in (clone, *clone.rglob("*")):
        os.lchown(path, os.geteuid(), os.getegid())
    as_root(clone, tmp_path_factory.mktemp("var"), "help")
    assert list(clone.glob("orkestr_console/__pycache__/*.pyc"))


def test_the_suites_caches_are_not_left_in_anothers_clone(
    clone: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    (clone / "test_it.py").write_text(
        "from hypothesis import given, strategies\n\n\n"
        "@given(strategies.integers())\n"
        "def test_it(n: int) -> None:\n    assert isinstance(n, int)\n"
    )
    os.chown(clone / "test_it.py", SOMEBODY, SOMEBODY)
    own = environment(scratch, "postgresql:///", clone)
    for argv in (["pytest", "-q"], ["mypy", "test_it.py"], ["ruff", "check", "test_it.py"]):
        command = [sys.executable, "-m", *argv]
        done = subprocess.run(command, cwd=clone, env=own, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert roots(clone) == []
