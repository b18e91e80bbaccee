"""The unit for systemd: what it says, and what systemd says to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orkestr_console.runner.layout import TREE, layout_from
from orkestr_console.runner.service import quoted, unit

GIVEN = {
    "PORT": "8123",
    "ORKESTR_VAR": "/srv/100 % of it",
    "ORKESTR_PUBLIC_URL": "https://console.example",
    "ORKESTR_SECRET_KEY": "not to be read",
    "DATABASE_URL": "postgres://me:not to be read@db/x",
    "HOME": "/root",
}


def test_it_has_what_is_configured_and_no_secret() -> None:
    lines = unit(layout_from({"PORT": "8123"}), GIVEN).splitlines()
    assert [line for line in lines if line.startswith("Environment=")] == [
        'Environment="ORKESTR_PUBLIC_URL=https://console.example"',
        'Environment="ORKESTR_VAR=/srv/100 %% of it"',
        'Environment="PORT=8123"',
    ]
    assert "not to be read" not in "\n".join(lines)


def test_what_is_left_out_is_said() -> None:
    done = subprocess.run(
        [sys.executable, "manage.py", "systemd_unit"],
        cwd=TREE,
        env={**os.environ, "DATABASE_URL": "postgres://me:hidden@db/x"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "DATABASE_URL: not in the unit" in done.stderr
    assert "hidden" not in done.stdout + done.stderr


def test_words_are_quoted_as_systemd_reads_them() -> None:
    assert quoted('a "b" \\ 5%') == '"a \\"b\\" \\\\ 5%%"'


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd on this machine")
def test_systemd_has_nothing_against_it(tmp_path: Path) -> None:
    file = tmp_path / "orkestr.service"
    file.write_text(unit(layout_from({}), GIVEN))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True)
    mine = [line for line in done.stderr.splitlines() if "orkestr" in line]
    assert mine == []
