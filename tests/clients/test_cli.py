"""The official command line, with a configuration file in a home of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stack import Stack


class Cli:
    """`orkestr …` as a person runs it."""

    def __init__(self, stack: Stack, home: Path) -> None:
        self._program = Path(sys.executable).with_name("orkestr")
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        settings = home / ".orkestr" / "config.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps({"api_url": stack.url, "api_token": stack.api_key}))

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def orkestr(stack: Stack, tmp_path: Path) -> Cli:
    return Cli(stack, tmp_path)


def test_create_list_exec_info_and_kill(orkestr: Cli) -> None:
    created = orkestr("sbx", "create", "debian-12", "--json")
    assert created.returncode == 0, created.stderr
    sandbox = json.loads(created.stdout)["id"]
    try:
        assert sandbox in orkestr("sbx", "list", "--status", "running", "--json").stdout
        done = orkestr("sbx", "exec", sandbox, "echo out; echo err >&2; exit 5")
        assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 5)
        assert json.loads(orkestr("sbx", "info", sandbox, "--json").stdout)["status"] == "running"
    finally:
        assert orkestr("sbx", "kill", sandbox).returncode == 0
    assert json.loads(orkestr("sbx", "info", sandbox, "--json").stdout)["status"] == "terminated"


def test_an_unknown_sandbox_is_one_plain_line(orkestr: Cli) -> None:
    done = orkestr("sbx", "info", "sbx_01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1
