"""Paths and port from the environment, and one installation at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orkestr_console.runner.layout import TREE, StartError, layout_from
from orkestr_console.runner.lock import exclusive_lock, lock_holder
from orkestr_console.runner.summary import (
    Credentials,
    known_credentials,
    summary,
    write_console_json,
)

CREDENTIALS = Credentials("admin@demo.example", "pa$$ {word}", "Demo", "ork_a_b")


def test_everything_has_a_default() -> None:
    layout = layout_from({})
    assert layout.var == TREE / "var"
    assert layout.state_dir == TREE / "var/host"
    assert layout.host_socket == TREE / "var/run/host.sock"
    assert layout.port == 8000
    assert layout.environment()["DATABASE_URL"].endswith(f"?host={TREE}/var/run/pg")


def test_an_empty_variable_is_as_good_as_none() -> None:
    blank = dict.fromkeys(("ORKESTR_VAR", "ORKESTR_STATE_DIR", "PORT", "DATABASE_URL"), "")
    assert layout_from(blank) == layout_from({})


def test_a_database_of_the_operators_own_is_passed_on() -> None:
    layout = layout_from({"DATABASE_URL": "postgres://db.example/x"})
    assert layout.environment()["DATABASE_URL"] == "postgres://db.example/x"


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "8000.5"])
def test_a_port_that_is_none_is_refused_by_name(port: str) -> None:
    with pytest.raises(StartError, match="PORT is"):
        layout_from({"PORT": port})


def test_a_path_too_long_for_a_socket_is_refused_with_a_way_out(tmp_path: Path) -> None:
    layout = layout_from({"ORKESTR_VAR": str(tmp_path / ("x" * 120))})
    with pytest.raises(StartError, match="ORKESTR_HOST_SOCKET or ORKESTR_VAR"):
        layout.prepare()


def test_a_var_too_long_for_any_of_its_sockets_is_refused(tmp_path: Path) -> None:
    """The host's socket may be elsewhere, and the database, too: the manager's is in it."""
    elsewhere = {"ORKESTR_HOST_SOCKET": str(tmp_path / "sock"), "DATABASE_URL": "postgres://db/x"}
    layout = layout_from({"ORKESTR_VAR": str(tmp_path / ("x" * 70)), **elsewhere})
    with pytest.raises(StartError, match=r"supervisor\.sock.*bytes.*set ORKESTR_VAR to a shorter"):
        layout.prepare()


def test_a_path_that_cannot_be_configured_is_refused(tmp_path: Path) -> None:
    layout = layout_from({"ORKESTR_VAR": str(tmp_path / "100%")})
    with pytest.raises(StartError, match="use another directory"):
        layout.prepare()


def test_a_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    layout = layout_from({"ORKESTR_VAR": str(tmp_path)})
    layout.prepare()
    assert lock_holder(layout) is None
    with exclusive_lock(layout):
        assert lock_holder(layout) == os.getpid()
        layout.ready.write_text("http://here\n")
        with (
            pytest.raises(StartError, match=f"process {os.getpid()}, http://here"),
            exclusive_lock(layout),
        ):
            pass
    assert lock_holder(layout) is None


def test_credentials_survive_in_a_file_for_root_alone(tmp_path: Path) -> None:
    layout = layout_from({"ORKESTR_VAR": str(tmp_path)})
    layout.prepare()
    assert known_credentials(layout) is None
    write_console_json(layout, CREDENTIALS)
    assert known_credentials(layout) == CREDENTIALS
    assert layout.console_json.stat().st_mode & 0o777 == 0o600


def test_the_summary_has_what_one_needs_to_begin() -> None:
    text = summary(layout_from({"PORT": "9123"}), CREDENTIALS, 3.21)
    for part in ("http://127.0.0.1:9123/", *vars(CREDENTIALS).values(), "from orkestr import"):
        assert part in text
    assert '{"name": "data-stack"' in text
