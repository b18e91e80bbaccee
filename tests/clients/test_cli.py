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
        self.settings = home / ".orkestr" / "config.json"
        self.settings.parent.mkdir(parents=True)
        self.settings.write_text(json.dumps({"api_url": stack.url, "api_token": stack.api_key}))

    def __call__(self, *arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *arguments],
            env=self._environment,
            input=typed,
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


def test_pause_at_the_end_wake_by_use_and_resume(orkestr: Cli) -> None:
    options = ("--timeout", "3600", "--pause-on-timeout", "--auto-resume", "--size", "small")
    created = orkestr("sbx", "create", "debian-12", *options, "--network", "restricted", "--json")
    assert created.returncode == 0, created.stderr
    sandbox = json.loads(created.stdout)["id"]
    try:
        assert f"paused {sandbox}" in orkestr("sbx", "pause", sandbox).stdout
        done = orkestr("sbx", "exec", sandbox, "--cwd", "/tmp", "--timeout", "5", "--json", "pwd")
        told = json.loads(done.stdout)
        assert (told["stdout"], told["stderr"], told["exit_code"]) == ("/tmp\n", "", 0)
        orkestr("sbx", "pause", sandbox)
        assert f"resumed {sandbox}" in orkestr("sbx", "resume", sandbox).stdout
        shell = orkestr("sbx", "shell", sandbox, typed="echo hello\nfalse\nexit\n")
        assert (shell.returncode, shell.stdout) == (0, "hello\n")
        assert "[exit 1]" in shell.stderr
    finally:
        assert orkestr("sbx", "kill", sandbox).returncode == 0


def test_metrics_are_those_of_the_sandbox(orkestr: Cli) -> None:
    created = orkestr("sbx", "create", "debian-12", "--json")
    sandbox = json.loads(created.stdout)["id"]
    try:
        megabytes = 100
        orkestr("sbx", "exec", sandbox, f"head -c {megabytes}M /dev/zero >/tmp/zeros")
        told = json.loads(orkestr("sbx", "metrics", sandbox, "--json").stdout)
        assert (told["sandbox_status"], told["cpu"]["cores"]) == ("running", 1.0)
        assert told["memory"]["limit_bytes"] == 1024 * 1024 * 1024
        assert megabytes * 1024 * 1024 <= told["memory"]["usage_bytes"] < 512 * 1024 * 1024
        assert " / 1024 MB" in orkestr("sbx", "metrics", sandbox).stdout
        orkestr("sbx", "pause", sandbox)
        told = json.loads(orkestr("sbx", "metrics", sandbox, "--json").stdout)
        assert (told["sandbox_status"], told["memory"]["usage_bytes"]) == ("paused", None)
    finally:
        orkestr("sbx", "kill", sandbox)
    assert orkestr("sbx", "metrics", sandbox).returncode == 0
