"""Commands in a real container: what they see, what comes back, how they are made to end."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.errors import (
    ContainerGone,
    CwdNotFound,
    ExecKilled,
    ExecTimeout,
    InvalidRequest,
    NotFound,
)
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.client import HostClient
from tests.host.commands import Command
from tests.host.conftest import BASE, NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]


def processes(host: HostClient, sandbox: SandboxInfo) -> str:
    """The names of all processes inside, but for those that ask."""
    listing = host.exec(
        sandbox.id, Exec(["/bin/sh", "-c", "cat /proc/[0-9]*/comm"])
    ).stdout.decode()
    return " ".join(name for name in listing.split() if name not in ("cat", "sh"))


def test_stdout_stderr_and_the_exit_code_come_back_apart(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    result = host.exec(sandbox.id, Exec("echo to-out; echo to-err >&2; exit 7"))
    assert (result.stdout, result.stderr) == (b"to-out\n", b"to-err\n")
    assert (result.code, result.signal, result.out_of_memory) == (7, None, False)
    assert result.pid is not None


def test_a_command_killed_by_a_signal_says_which(host: HostClient, sandbox: SandboxInfo) -> None:
    result = host.exec(sandbox.id, Exec("kill -SEGV $$"))
    assert (result.code, result.signal) == (128 + 11, 11)


def test_commands_run_in_bash_where_the_image_has_it(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    assert host.exec(sandbox.id, Exec('a=(1 2 3); echo "${#a[@]} $0"')).stdout == b"3 bash\n"


def test_a_list_of_words_is_run_without_a_shell(host: HostClient, sandbox: SandboxInfo) -> None:
    assert host.exec(sandbox.id, Exec(["echo", "$HOME; ls"])).stdout == b"$HOME; ls\n"


def test_a_program_that_is_not_there_is_127_and_says_so(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    result = host.exec(sandbox.id, Exec(["no-such-program"]))
    assert result.code == 127
    assert b"no-such-program" in result.stderr


def test_the_working_directory_is_the_workspace_unless_told(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    assert host.exec(sandbox.id, Exec("pwd")).stdout == b"/workspace\n"
    assert host.exec(sandbox.id, Exec("pwd", cwd="/usr/lib")).stdout == b"/usr/lib\n"


def test_a_missing_working_directory_is_refused_at_once(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    with pytest.raises(CwdNotFound, match="/nope"):
        host.exec(sandbox.id, Exec("true", cwd="/nope"))
    with pytest.raises(CwdNotFound, match="Not a directory"):
        host.exec(sandbox.id, Exec("true", cwd="/etc/passwd"))


def test_the_environment_is_clean_and_layered(
    host: HostClient, new_sandbox: NewSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = new_sandbox(env={"FROM": "sandbox", "KEPT": "yes"})
    lines = host.exec(sandbox.id, Exec(["env"], env={"FROM": "exec"})).stdout.decode().splitlines()
    environment = dict(line.split("=", 1) for line in lines)
    assert environment["FROM"] == "exec"
    assert environment["KEPT"] == "yes"
    assert environment["HOME"] == "/root"
    assert "/usr/bin" in environment["PATH"]
    # Of the agent's own, or of the tests', nothing.
    assert not {"VIRTUAL_ENV", "PYTEST_CURRENT_TEST", "PYTHONPATH", "container"} & set(environment)


@pytest.mark.parametrize(
    ("script", "printed", "code"),
    [
        ("#!/usr/bin/perl\nprint 6 * 7, qq(\n); exit 3;", b"42\n", 3),
        (
            "#! /usr/bin/env perl\nmy $x = '\"$HOME\" `id` \\\\ %s';\nprint $x;",
            b'"$HOME" `id` \\ %s',
            0,
        ),
        ("#!/bin/sh -e\necho begun\nfalse\necho never", b"begun\n", 1),
        ("#!/usr/bin/env -S bash -eu\necho begun\necho $UNKNOWN\necho never", b"begun\n", 1),
        ("#!/bin/bash\nfalse\necho ${BASH_VERSION:+bash}", b"bash\n", 0),
        ("#!/usr/bin/env bash\nfalse\necho on", b"on\n", 0),
        ("#!/usr/bin/perl\n# " + "é" * 70_000 + "\nprint 'large';", b"large", 0),
        ("#!/no/such/interpreter\n", b"", 127),
    ],
)
def test_a_script_is_run_by_the_interpreter_that_it_names(
    host: HostClient, sandbox: SandboxInfo, script: str, printed: bytes, code: int
) -> None:
    done = host.exec(sandbox.id, Exec(script))
    assert (done.stdout, done.code) == (printed, code)
    assert host.exec(sandbox.id, Exec("ls -A /tmp")).stdout == b""


def test_a_script_that_is_killed_is_ended_with_all_that_it_started(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    with pytest.raises(ExecTimeout):
        host.exec(sandbox.id, Exec("#!/usr/bin/perl\nsystem('sleep 600');", timeout_seconds=1))
    assert "perl" not in processes(host, sandbox)
    assert "sleep" not in processes(host, sandbox)


def test_a_variable_may_be_as_large_as_the_kernel_takes_and_no_larger(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    """MAX_ARG_STRLEN of execve(2), in bytes: 128 KiB with the name, "=" and NUL."""
    sandbox = new_sandbox(env={"B": "x" * 60_000})
    largest = "x" * (128 * 1024 - 3)
    measure = 'echo "${#A}"'
    assert host.exec(sandbox.id, Exec(measure, env={"A": largest})).stdout == b"131069\n"
    for value in (f"{largest}x", "é" * 65_600):
        with pytest.raises(InvalidRequest, match="variable A would have 131,"):
            host.exec(sandbox.id, Exec(measure, env={"A": value}))
        with pytest.raises(InvalidRequest, match="variable A would have 131,"):
            new_sandbox(env={"A": value})


def test_an_environment_grown_over_templates_is_refused_or_works(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    """Template over template over template, a sandbox and a command, each with all it may have."""
    names = [f"img_env{number}_{time.time_ns():x}" for number in range(4)]
    base, ends = BASE, []
    for name in names:
        grown = {"GROWN": "x" * 40_000 + ":$GROWN"}
        host.start_build(
            StartBuild(name, base_image=base, recipe=["true"], network="restricted", env=grown)
        )
        ends.append(list(host.build_events(name))[-1])
        base = name if ends[-1].kind == "published" else base
    try:
        assert [end.kind for end in ends] == ["published"] * 3 + ["failed"]
        assert ends[-1].data["code"] == "environment_too_large"
        assert "GROWN" in ends[-1].data["message"]
        box = new_sandbox(image=base, env={"OWN": "y" * 65_000})
        done = host.exec(box.id, Exec('echo "${#GROWN} ${#OWN} ${#A}"', env={"A": "z" * 65_000}))
        assert done.stdout == b"120002 65000 65000\n"
    finally:
        for name in names:
            host.delete_image(name)


@pytest.mark.parametrize("env", [{"A=B": "x"}, {"": "x"}, {"A": "nul\0"}])
def test_an_impossible_environment_is_refused(
    host: HostClient, sandbox: SandboxInfo, env: dict[str, str]
) -> None:
    with pytest.raises(InvalidRequest):
        host.exec(sandbox.id, Exec("true", env=env))


def test_the_input_is_empty_and_the_descriptors_are_three(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    assert host.exec(sandbox.id, Exec("cat; ls /proc/self/fd")).stdout.split() == [
        b"0",
        b"1",
        b"2",
        b"3",
    ]


def test_every_command_has_a_session_of_its_own_and_the_usual_umask(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    # Fields 1 and 6 of stat are the pid and the session (proc(5)).
    command = "umask; read -r pid _ _ _ _ sid _ < /proc/$$/stat; echo $pid $sid"
    result = host.exec(sandbox.id, Exec(command))
    umask, own, session = result.stdout.split()
    assert umask == b"0022"
    assert own == session


def test_signals_are_as_a_program_expects_them(host: HostClient, sandbox: SandboxInfo) -> None:
    status = host.exec(sandbox.id, Exec(["cat", "/proc/self/status"])).stdout.decode()
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    # 32 and 33 are the C library's own (signal(7)); make(1) starts its children ignoring 32.
    own = 0b11 << 31
    assert int(masks["SigIgn"], 16) & ~own == 0


def test_much_output_on_both_streams_arrives_whole(host: HostClient, sandbox: SandboxInfo) -> None:
    command = "head -c 3000000 /dev/zero & head -c 2000000 /dev/zero >&2; wait"
    result = host.exec(sandbox.id, Exec(command))
    assert (len(result.stdout), len(result.stderr)) == (3_000_000, 2_000_000)
    assert not result.truncated


def test_output_over_the_cap_is_dropped_without_disturbing_the_command(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    command = "head -c 3000000 /dev/zero; echo done > /workspace/done"
    result = host.exec(sandbox.id, Exec(command, max_output_bytes=1000))
    assert (len(result.stdout), result.truncated, result.code) == (1000, True, 0)
    assert host.exec(sandbox.id, Exec("cat /workspace/done")).stdout == b"done\n"


def test_a_script_of_256_kib_runs_as_a_short_one_does(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    # The kernel takes 128 KiB less a byte in one argument (MAX_ARG_STRLEN).
    for size in (131_071, 131_072, 256 * 1024):
        end = "\nset -- a; cat <<E\n$# $0 ü $LINENO\nE\nexit 3\n"
        filler = "# é '\"$`\\ \n"
        lines = (size - len(end.encode())) // len(filler.encode())
        script = (filler * lines + end).encode()
        padded = " " * (size - len(script)) + script.decode()
        result = host.exec(sandbox.id, Exec(padded))
        assert (result.stdout, result.code) == (f"1 bash ü {lines + 2}\n".encode(), 3), size
    assert host.exec(sandbox.id, Exec("echo 'x" * 40_001)).code == 2


def test_a_list_of_words_with_one_that_is_too_long_says_why(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    too_long = host.exec(sandbox.id, Exec(["echo", "x" * 200_000]))
    assert too_long.code == 126
    assert b"Argument list too long" in too_long.stderr


def test_a_timeout_kills_a_tree_that_forked_twice_and_ignores_sigterm(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    command = (
        "trap '' TERM; echo begun; (setsid sh -c \"trap '' TERM; (sleep 301 &) ; sleep 302\" &); "
        "sleep 303"
    )
    with pytest.raises(ExecTimeout) as caught:
        host.exec(sandbox.id, Exec(command, timeout_seconds=0.5))
    assert caught.value.extra["stdout"] == b"begun\n"
    assert caught.value.extra["duration_ms"] > 2400, "half a second, and two of grace"
    assert processes(host, sandbox) == "init"


def test_a_timeout_asks_first(host: HostClient, sandbox: SandboxInfo) -> None:
    command = "trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done"
    took = []
    for _ in range(3):
        with pytest.raises(ExecTimeout) as caught:
            host.exec(sandbox.id, Exec(command, timeout_seconds=0.5))
        assert caught.value.extra["stdout"] == b"bye\n"
        took.append(caught.value.extra["duration_ms"])
        if took[-1] < 2500:
            return
    raise AssertionError(f"it waited for the two seconds of grace to pass: {took}")


def test_a_timeout_ends_a_tree_that_forks_for_ever(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(cpu=0.2)
    with pytest.raises(ExecTimeout):
        host.exec(sandbox.id, Exec("f() { sleep 0.2; f | f & }; f; sleep 60", timeout_seconds=1))
    assert processes(host, sandbox) == "init"


def test_what_runs_in_the_background_neither_holds_the_command_nor_dies_with_it(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    writing = "while :; do printf '%01000d\\n' 1; echo >>/tmp/lines; done"
    left = f"tail -f /dev/null & {{ {writing}; }} &"
    result = host.exec(sandbox.id, Exec(f"{left} echo over", timeout_seconds=30))
    assert b"over\n" in result.stdout
    # Three times what a pipe holds: its output still has somewhere to go.
    for _ in eventually():
        if int(host.exec(sandbox.id, Exec("cat /tmp/lines | wc -l")).stdout) > 200:
            break
    assert "tail" in processes(host, sandbox)


def test_what_goes_on_writing_costs_the_agent_little(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    def cpu_seconds() -> float:
        fields = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()
        return float((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))

    for _ in range(4):
        host.exec(sandbox.id, Exec("yes & yes >&2 & echo over"))
    began = cpu_seconds()
    time.sleep(2)
    # Read as fast as it comes, it takes all of a processor.
    assert cpu_seconds() - began < 0.8
    assert host.exec(sandbox.id, Exec("echo on")).stdout == b"on\n"


def test_pipes_left_behind_are_bounded(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    descriptors = Path(f"/proc/{agent.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for _ in range(150):
        host.exec(sandbox.id, Exec("sleep 300 & echo over"))
    assert len(list(descriptors.iterdir())) - before < 150
    assert host.exec(sandbox.id, Exec("pgrep -c sleep")).stdout == b"150\n"
    host.delete_sandbox(sandbox.id)
    for _ in eventually():
        if len(list(descriptors.iterdir())) - before < 20:
            break


def test_the_kernels_memory_killer_is_named(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox(memory_mb=96)
    result = host.exec(
        sandbox.id, Exec('x=$(head -c 300000000 /dev/zero | tr "\\0" x); echo ${#x}')
    )
    assert result.out_of_memory
    assert result.code == 137
    again = host.exec(sandbox.id, Exec("echo alive; exit 3"))
    assert (again.stdout, again.code, again.out_of_memory) == (b"alive\n", 3, False)


def test_many_at_once_keep_their_output_apart(host: HostClient, sandbox: SandboxInfo) -> None:
    with ThreadPoolExecutor(10) as pool:
        results = list(
            pool.map(
                lambda n: host.exec(sandbox.id, Exec(f"echo {n}; sleep 0.1; echo {n}")), range(10)
            )
        )
    assert [result.stdout for result in results] == [f"{n}\n{n}\n".encode() for n in range(10)]


def test_terminating_a_sandbox_ends_the_commands_in_it(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    command = Command(host, sandbox.id, "sleep 306")
    host.delete_sandbox(sandbox.id)
    command.join()
    assert isinstance(command.error, ExecKilled)
    assert command.error.signal == 9


def test_there_is_no_exec_where_there_is_no_sandbox(host: HostClient, sandbox: SandboxInfo) -> None:
    with pytest.raises(NotFound):
        host.exec("sbx_unknown", Exec("true"))
    host.delete_sandbox(sandbox.id)
    with pytest.raises((NotFound, ContainerGone)):
        host.exec(sandbox.id, Exec("true"))


async def test_frames_come_as_they_are_written(agent: Agent, sandbox: SandboxInfo) -> None:
    """The second chunk is written once the first has been read, so they cannot come together."""
    arrived: list[str] = []
    command = "echo a; until [ -e /workspace/read ]; do sleep 0.02; done; echo b >&2; exit 4"
    async with AsyncHostClient(agent.socket) as client:
        async for frame in client.exec_frames(sandbox.id, Exec(command)):
            arrived.append(frame.kind)
            if arrived == ["started", "chunk"]:
                await asyncio.to_thread(agent.client.write_file, sandbox.id, "/workspace/read", b"")
    assert arrived == ["started", "chunk", "chunk", "exited"]


async def test_going_away_kills_the_tree(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    async with AsyncHostClient(agent.socket) as client:
        frames = client.exec_frames(sandbox.id, Exec("sleep 307 & echo on; sleep 308"))
        async for frame in frames:
            if frame.kind == "chunk":
                break
        await frames.aclose()  # type: ignore[attr-defined]
    for _ in range(600):
        await asyncio.sleep(0.05)
        if "sleep" not in await asyncio.to_thread(processes, host, sandbox):
            return
    raise AssertionError("the command outlived whoever asked for it")


def test_the_agents_processes_inside_cannot_be_looked_into(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    """File operations run inside with the launcher's memory; container root must not see it."""
    host.write_file(sandbox.id, "/workspace/a", b"a")
    spying = (
        "end=$((SECONDS+3)); seen=0; while [ $SECONDS -lt $end ]; do for p in /proc/[0-9]*; do "
        "[ ${p#/proc/} = 1 ] && continue; [ ${p#/proc/} = $$ ] && continue; "
        "[ -d $p ] && seen=$((seen+1)); "
        "cat $p/maps $p/environ 2>/dev/null | tr '\\0' '\\n' | grep -a -i -m1 -E 'python|orkestr'; "
        "done; done; echo looked-at $seen >&2"
    )
    with ThreadPoolExecutor(1) as pool:
        spy = pool.submit(host.exec, sandbox.id, Exec(spying))
        for _ in range(60):
            host.read_path(sandbox.id, "/workspace/a")
        result = spy.result()
    assert int(result.stderr.split()[1]) > 0
    assert result.stdout == b""
