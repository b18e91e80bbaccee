"""What anybody on the machine may read of a running installation: command lines, the managers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from orkestr_console.runner import programs
from orkestr_console.runner.account import Identity
from orkestr_console.runner.keeper import Keeper
from orkestr_console.runner.layout import Layout, layout_from

SECRET = "hunter2-of-the-database"


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    address = f"postgres://orkestr:{SECRET}@db.example/orkestr"
    for name in ("ORKESTR_SECRET_KEY", "ORKESTR_TOKEN_PEPPER"):
        monkeypatch.setenv(name, SECRET)
    made = layout_from({"ORKESTR_VAR": str(tmp_path), "PORT": "1", "DATABASE_URL": address})
    made.prepare()
    return made


def test_no_command_line_has_a_secret(layout: Layout) -> None:
    """They come by the environment, which only the same user and root may read (proc(5))."""
    assert SECRET in layout.environment()["DATABASE_URL"], "there is none to be kept: no proof"
    identity = Identity("orkestr", ("setpriv", "--"))
    started = [
        programs.agent(layout),
        programs.worker(layout, identity),
        programs.web(layout, identity),
    ]
    assert all("manage.py" in str(p.command) or "hostruntime" in str(p.command) for p in started)
    assert SECRET not in repr([program.command for program in started])
    keeper = Keeper(layout, started)
    keeper._write_config()
    config = layout.run / "supervisord.conf"
    assert "manage.py" in config.read_text()
    assert SECRET not in config.read_text()
    assert config.stat().st_mode & 0o077 == 0


def test_the_logs_are_not_for_everybody(layout: Layout) -> None:
    assert layout.log.stat().st_mode & 0o007 == 0
