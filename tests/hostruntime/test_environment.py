"""What is baked into an image's environment, and what a process makes of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hostruntime.image.environment import (
    MAX_FILE_BYTES,
    merge_baked,
    parse_environment_file,
    read_environment_file,
    recipe_variables,
    resolve_environment,
)
from tests.hostruntime.trees_help import grow

HOST = {"PATH": "/usr/bin:/bin", "HOME": "/root", "http_proxy": "http://10.0.0.1:3128"}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("/opt/x/bin:$PATH", "/opt/x/bin:/usr/bin:/bin"),
        ("${PATH}:/opt/x", "/usr/bin:/bin:/opt/x"),
        ("/only", "/only"),
        ("/a:$PATHS:${PAT}", "/a:$PATHS:${PAT}"),
        ("$PATH:$PATH", "/usr/bin:/bin:$PATH"),
        ("$HOME/bin", "$HOME/bin"),
        ("", ""),
    ],
)
def test_a_variable_stands_for_itself_in_its_value(value: str, path: str) -> None:
    assert resolve_environment(HOST, {"PATH": value}) == {**HOST, "PATH": path}


@pytest.mark.parametrize(
    ("value", "found"),
    [("/x/lib:$LD_LIBRARY_PATH", "/x/lib"), ("${LD_LIBRARY_PATH}:/x", "/x"), ("a$b", "a$b")],
)
def test_of_a_variable_that_was_not_there_no_empty_entry_is_left(value: str, found: str) -> None:
    assert resolve_environment({}, {"LD_LIBRARY_PATH": value}) == {"LD_LIBRARY_PATH": found}


def test_a_template_on_a_template_adds_to_what_that_has() -> None:
    first = merge_baked({}, {"PATH": "/one:$PATH", "A": "1", "C": "$C-c"})
    second = merge_baked(first, {"PATH": "/two:$PATH", "A": "2", "C": "c2"})
    assert second == {"PATH": "/two:/one:$PATH", "A": "2", "C": "c2"}
    assert resolve_environment(HOST, second)["PATH"] == "/two:/one:/usr/bin:/bin"


def test_thousands_of_variables_hold_up_nobody() -> None:
    """Each exec does this on the agent's event loop, for which everybody waits."""
    own = {f"v{number}": f"${{v{number}}}:x" for number in range(5000)}
    began = time.process_time()
    assert resolve_environment({"v7": "a"}, own) == {**dict.fromkeys(own, "x"), "v7": "a:x"}
    assert time.process_time() - began < 0.7
    # Names that the host takes are words, not patterns.
    assert resolve_environment({}, {"A(": "$A(", "A.": "$AB"}) == {"A(": "$A(", "A.": "$AB"}


def test_etc_environment_is_read_as_pam_does() -> None:
    text = (
        '# APP=no\n\n  APP_HOME=/opt/app  \nexport QUOTED="a b"\nSINGLE=\'x\'\nHALF="y\nE=\n'
        'bad name=1\n1A=1\nno\nPATH="/a:$PATH"\nPATH=/b:$PATH\nNUL=a\0b\nCR=1\r\n'
    )
    assert parse_environment_file(text) == {
        "APP_HOME": "/opt/app",
        "QUOTED": "a b",
        "SINGLE": "x",
        "HALF": "y",
        "E": "",
        "PATH": "/b:/a:$PATH",
        "CR": "1",
    }


def test_only_what_the_recipe_wrote_is_its_own() -> None:
    before = "A=1\nB=1\n"
    after = f"A=1\nB=2\nhttps_proxy=http://other\nHOME=/root\nLANG=de_DE\n{'x' * 10}\n"
    assert recipe_variables(after, before, HOST) == {"B": "2", "LANG": "de_DE"}


def test_the_file_is_read_through_no_link_and_not_without_end(tmp_path: Path) -> None:
    tree = grow(tmp_path / "plain", {"etc/environment": "A=1\n"})
    assert read_environment_file(tree) == "A=1\n"
    assert read_environment_file(grow(tmp_path / "none", {"etc/x": ""})) == ""
    assert read_environment_file(grow(tmp_path / "nothing", {"x": ""})) == ""
    linked = grow(tmp_path / "linked", {"etc/x": ""})
    (linked / "etc/environment").symlink_to(tree / "etc/environment")
    assert read_environment_file(linked) == ""
    elsewhere = grow(tmp_path / "elsewhere", {"x": ""})
    (elsewhere / "etc").symlink_to(tree / "etc")
    assert read_environment_file(elsewhere) == ""
    pipe = grow(tmp_path / "pipe", {"etc/x": ""})
    os.mkfifo(pipe / "etc/environment")
    assert read_environment_file(pipe) == ""
    large = grow(tmp_path / "large", {"etc/environment": "A=1\n" * MAX_FILE_BYTES})
    assert len(read_environment_file(large)) <= MAX_FILE_BYTES
    assert parse_environment_file(read_environment_file(large)) == {"A": "1"}
