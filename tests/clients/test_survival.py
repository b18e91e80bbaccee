"""Processes that are killed, and a machine's owner who starts and stops the console."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psycopg
from orkestr import OrkestrClient, Sandbox

from tests.clients.making import Sandboxes, Templates
from tests.leftovers import processes_of
from tests.processes import command_lines, commands_containing, own_mark
from tests.stack import Stack, wait_for


def builds_running(stack: Stack) -> set[str]:
    """Builds that have a disk mounted on the host now."""
    mounts = Path("/proc/self/mountinfo").read_text()
    builds = stack.layout.state_dir / "builds"
    return {path.name for path in builds.iterdir() if f"/disks/{path.name} " in mounts}


def test_a_worker_killed_during_a_build_lets_it_finish_once(
    stack: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    template = templates.create("debian-12", "echo run >> /root/runs", "sleep 3", "echo end")
    wait_for(lambda: bool(builds_running(stack)), 30, stack.explain)
    worker = stack.pid("worker")
    stack.kill("worker")
    stack.wait_until_restarted("worker", worker)
    record = templates.finished(template)
    assert record["status"] == "ready", record
    assert sandboxes.boot(template).exec("cat /root/runs").stdout == "run\n"
    assert builds_running(stack) == set()


def test_an_agent_killed_during_a_build_fails_it_and_leaves_nothing(
    stack: Stack, templates: Templates
) -> None:
    mark = own_mark()
    template = templates.create("debian-12", f"sleep {mark}", "true")
    wait_for(lambda: bool(builds_running(stack)), 30, stack.explain)
    agent = stack.pid("agent")
    stack.kill("agent")
    stack.wait_until_restarted("agent", agent, 60)
    record = templates.finished(template)
    assert record["status"] == "failed"
    assert record["error_code"] == "host_lost", record
    wait_for(lambda: builds_running(stack) == set(), 30, stack.explain)
    assert commands_containing(mark) == []


def test_a_console_stopped_during_a_build_says_that_the_host_was_lost(
    stack: Stack, templates: Templates
) -> None:
    """Not that the step was killed, which is only how it ended."""
    mark = own_mark()
    template = templates.create("debian-12", f"sleep {mark}", "true")
    wait_for(lambda: bool(builds_running(stack)), 30, stack.explain)
    stack.stop()
    stack.start()
    record = templates.finished(template)
    assert (record["status"], record["error_code"]) == ("failed", "host_lost"), record
    assert commands_containing(mark) == []


def test_sandboxes_outlive_agent_worker_and_web(stack: Stack, sandbox: Sandbox) -> None:
    sandbox.exec("echo kept > /workspace/kept; (sleep 600 &)")
    for program in ("agent", "worker", "web"):
        old = stack.pid(program)
        stack.kill(program)
        stack.wait_until_restarted(program, old, 60)
    wait_for(lambda: answers(stack, sandbox), 30, stack.explain)
    assert sandbox.exec("cat /workspace/kept").stdout == "kept\n"


def test_commands_that_were_answered_are_in_the_audit_log_whoever_dies(
    stack: Stack, sandbox: Sandbox
) -> None:
    """Their entries are written behind the answers."""
    commands = 8
    for _ in range(commands):
        sandbox.exec("true")
    old = stack.pid("web")
    stack.kill("web")
    stack.wait_until_restarted("web", old, 60)
    with psycopg.connect(stack.layout.cluster.url, autocommit=True) as database:

        def recorded() -> int:
            counted = database.execute(
                "SELECT count(*) FROM accounts_auditentry "
                "WHERE object_id = %s AND action = 'sandbox.exec'",
                [sandbox.id],
            ).fetchone()
            return counted[0] if counted else 0

        wait_for(lambda: recorded() == commands, 30, stack.explain)
    assert list(stack.layout.audit_spool.glob("*.spool"))
    wait_for(lambda: answers(stack, sandbox), 30, stack.explain)


def answers(stack: Stack, sandbox: Sandbox) -> bool:
    with stack.client() as client:
        try:
            answer = client.post(f"/v1/sandboxes/{sandbox.id}/exec", json={"command": "true"})
        except httpx.HTTPError:
            return False
        return answer.is_success


def test_a_restart_keeps_credentials_and_sandboxes_and_makes_nothing_again(
    stack: Stack, sandbox: Sandbox, sdk: OrkestrClient
) -> None:
    credentials = stack.credentials
    stack.stop()
    assert not stack.layout.ready.exists()
    said_before = stack.output.stat().st_size
    stack.start()
    said = stack.output.read_bytes()[said_before:].decode()
    assert stack.credentials == credentials
    assert sandbox.exec("echo still here").stdout == "still here\n"
    # That is what makes the second start a matter of seconds.
    assert re.search(r"schema +up to date", said), said
    assert re.search(r"base images +debian-12, ", said), said


def test_down_ends_sandboxes_and_keeps_everything_else(
    stack: Stack, sandbox: Sandbox, templates: Templates
) -> None:
    template = templates.ready("debian-12", "touch /root/kept")
    credentials = stack.credentials
    stack.down()
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    assert [line for line in lines if str(stack.layout.state_dir) in line] == []
    stack.start()
    assert stack.credentials == credentials
    assert not stack.layout.sandboxes_ended_marker.exists()
    with stack.client() as client:
        assert client.get(f"/v1/sandboxes/{sandbox.id}").json()["status"] == "terminated"
        body = {"template": template}
        again = client.post("/v1/sandboxes", json=body).json()["id"]
        command = {"command": "ls /root/kept"}
        answer = client.post(f"/v1/sandboxes/{again}/exec", json=command).json()
        client.delete(f"/v1/sandboxes/{again}")
    assert answer["exit_code"] == 0, answer


CAP_SYS_RESOURCE = 24


def test_when_memory_ends_sandboxes_go_before_what_serves_everybody(
    stack: Stack, sandbox: Sandbox
) -> None:
    def score(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    programs = [stack.pid(name) for name in ("postgres", "agent", "web", "worker")]
    least = max(map(score, programs))
    # Where root may: here it may be a container's.
    mine = int(re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[0], 16)
    may = bool(mine >> CAP_SYS_RESOURCE & 1)
    assert not may or least < 0
    mark = own_mark()
    lowering = (
        "echo 0 > /proc/self/oom_score_adj; cat /proc/1/oom_score_adj /proc/self/oom_score_adj"
    )
    told = sandbox.exec(f"(sleep {mark} >/dev/null 2>&1 &); {lowering}")
    inside = [score(pid) for pid, line in command_lines().items() if mark in line]
    assert inside
    assert min(inside) > max(least, 0)
    assert not may or [int(line) > 0 for line in told.stdout.split()] == [True, True], told


def test_a_second_start_says_that_one_runs_already(stack: Stack) -> None:
    second = stack.manage("up")
    assert second.returncode == 1
    assert "already runs" in second.stderr
    assert stack.url in second.stderr


def test_a_taken_port_is_named_with_a_way_out(stack: Stack, tmp_path: Path) -> None:
    environment = {**stack.environment(), "ORKESTR_VAR": str(tmp_path / "var")}
    del environment["ORKESTR_STATE_DIR"], environment["ORKESTR_HOST_SOCKET"]
    done = subprocess.run(
        [sys.executable, "manage.py", "up"],
        cwd=stack.layout.tree,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 1
    port = stack.layout.port
    assert f"port {port} is in use" in done.stderr
    assert f"PORT={port + 1}" in done.stderr


def test_credentials_are_for_root_alone(stack: Stack) -> None:
    status = stack.layout.console_json.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    record = json.loads(stack.layout.console_json.read_text())
    assert set(record) == {"url", "user", "password", "team", "api_key"}
    assert record["url"] == stack.url


def test_web_and_worker_have_no_power(stack: Stack) -> None:
    for program in ("web", "worker", "postgres"):
        status = Path(f"/proc/{stack.pid(program)}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["CapEff"] == fields["CapBnd"] == "0" * 16, program
        assert fields["NoNewPrivs"] == "1", program
        assert fields["Uid"].split()[0] != "0", program


def test_the_self_check_passes_and_leaves_nothing(stack: Stack) -> None:
    done = stack.manage("selfcheck")
    assert done.returncode == 0, done.stderr
    for step in ("build a template", "boot a sandbox", "run a command", "terminate", "delete"):
        assert step in done.stdout
    with stack.client() as client:
        rows = client.get("/v1/templates?limit=200").json()["templates"]
    assert "self-check" not in [row["name"] for row in rows]


def test_the_doctor_finds_this_machine_able(stack: Stack) -> None:
    done = stack.manage("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cgroups" in done.stdout


def test_every_process_belongs_to_the_installation(stack: Stack) -> None:
    """What the leftover check after the tests looks for is really there while it runs."""
    found = " ".join(processes_of(stack.layout.var))
    for part in ("supervisord", "hostruntime.agent", "postgres"):
        assert part in found
