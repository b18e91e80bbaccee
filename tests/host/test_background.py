"""Commands in the background of a real container: what they print, and who survives whom."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.container.cgroups import is_populated
from hostruntime.container.command_log import KEPT_BYTES, RING_BYTES
from hostruntime.errors import (
    ContainerGone,
    ContainerPaused,
    CwdNotFound,
    HostError,
    HostUnavailable,
    InvalidRequest,
    NoSpace,
    NotFound,
    TooManyCommands,
)
from hostruntime.host.patience import process_tree
from hostruntime.sandbox.background import (
    MAX_ACTIVE,
    MAX_REMEMBERED,
)
from hostruntime.wire.background import StartCommand
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, container_of, eventually, groups_named, is_running
from tests.host.background import (
    TITLE,
    begin,
    ended,
    files_of,
    groups_of,
    printed,
    supervisors,
    wait_for_output,
    with_mark,
)
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.host.test_pause import far
from tests.processes import own_mark

pytestmark = [pytest.mark.host, pytest.mark.pythons]

MAX_PRIVATE_KIB = 4 * 1024


def test_it_runs_on_prints_and_ends_with_its_status(host: HostClient, sandbox: SandboxInfo) -> None:
    command = "echo out; echo err >&2; until [ -e go ]; do sleep 0.02; done; echo last; exit 3"
    before = time.time()
    name = begin(host, sandbox, command)
    info = host.command(sandbox.id, name)
    assert (info.running, info.code, info.command) == (True, None, command)
    assert before - 1 <= info.started_at <= time.time() + 1
    assert host.exec(sandbox.id, Exec(f"cat /proc/{info.pid}/cmdline")).stdout.startswith(b"bash")
    wait_for_output(host, sandbox, name, b"out\nerr\n")
    host.write_file(sandbox.id, "/workspace/go", b"")
    info = ended(host, sandbox, name)
    assert (info.running, info.code, info.signal, info.killed) == (False, 3, None, False)
    assert info.duration_ms is not None
    assert printed(host, sandbox, name) == b"out\nerr\nlast\n"
    assert printed(host, sandbox, name, 8) == b"last\n"
    output = host.command_output(sandbox.id, name, 4, max_bytes=3)
    assert (output.data, output.offset, output.size) == (b"err", 4, 13)


def test_it_has_the_sandboxes_variables_and_its_own_directory(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(env={"A": "1", "B": "2"})
    name = begin(host, sandbox, 'echo "$A $B $(pwd)"', env={"B": "3"}, cwd="/usr")
    ended(host, sandbox, name)
    assert printed(host, sandbox, name) == b"1 3 /usr\n"


def test_it_is_like_any_other_command_inside(host: HostClient, sandbox: SandboxInfo) -> None:
    shown = (
        "nice; ulimit -a; cat /proc/self/oom_score_adj; umask; ls -l /proc/self/fd | wc -l; "
        "grep -E '^(Cap|Sig[BC]|Seccomp|NoNew|Uid|Gid|Groups)' /proc/self/status"
    )
    name = begin(host, sandbox, shown)
    ended(host, sandbox, name)
    assert printed(host, sandbox, name) == host.exec(sandbox.id, Exec(shown)).stdout


def test_the_same_id_starts_once(host: HostClient, sandbox: SandboxInfo) -> None:
    request = StartCommand("cmd_once", "echo x >> /workspace/file; sleep 60")
    first = host.start_command(sandbox.id, request)
    assert host.start_command(sandbox.id, request) == first
    assert len(host.background_commands(sandbox.id)) == 1


def test_what_cannot_be_started_leaves_nothing(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    with pytest.raises(CwdNotFound, match="/nope"):
        begin(host, sandbox, "true", cwd="/nope")
    with pytest.raises(InvalidRequest):
        begin(host, sandbox, "true\0")
    for bad in ("../x", "", "a" * 65, "."):
        with pytest.raises(InvalidRequest):
            host.start_command(sandbox.id, StartCommand(bad, "true"))
    assert files_of(agent, sandbox) == []
    assert host.background_commands(sandbox.id) == []
    for _ in eventually():
        if not supervisors(agent, sandbox):
            break
    assert not list(groups_of(agent, sandbox).unified.glob("background-*"))


def test_what_is_not_there_is_not_found(host: HostClient, sandbox: SandboxInfo) -> None:
    for name in ("cmd_none", "...", "%2e%2e"):
        with pytest.raises(NotFound):
            host.command(sandbox.id, name)
        with pytest.raises(NotFound):
            host.kill_command(sandbox.id, name)
        with pytest.raises(NotFound):
            host.command_output(sandbox.id, name)
    with pytest.raises(NotFound):
        host.background_commands("sbx_none")


def test_a_signal_that_ends_it_is_kept(host: HostClient, sandbox: SandboxInfo) -> None:
    name = begin(host, sandbox, "kill -SEGV $$")
    info = ended(host, sandbox, name)
    assert (info.code, info.signal, info.killed, info.out_of_memory) == (139, 11, False, False)


def test_one_that_takes_all_memory_says_so(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox(memory_mb=128)
    name = begin(host, sandbox, "exec tail /dev/zero")
    info = ended(host, sandbox, name)
    assert (info.signal, info.out_of_memory) == (9, True)


def test_killing_it_kills_the_whole_tree_and_keeps_the_record(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    mark = own_mark()
    script = (
        f"sleep {mark} & setsid sh -c 'setsid sleep {mark} & sleep {mark}' & "
        f"(( sleep {mark} & ) & ) ; trap '' TERM; while :; do sleep {mark}; done"
    )
    name = begin(host, sandbox, script)
    for _ in eventually():
        if len(with_mark(mark)) == 5:
            break
    neighbour = begin(host, sandbox, f"exec sleep {mark}")
    info = host.kill_command(sandbox.id, name)
    assert (info.running, info.killed, info.active) == (False, True, False)
    assert host.kill_command(sandbox.id, name) == info
    assert host.command(sandbox.id, name) == info
    assert len(with_mark(mark)) == 1
    assert host.command(sandbox.id, neighbour).running
    assert len(supervisors(agent, sandbox)) == 1
    assert not groups_of(agent, sandbox).background_group(name).exists()


def test_one_that_ends_well_at_sigterm_was_killed_all_the_same(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(
        host, sandbox, "trap 'echo bye; exit 0' TERM; echo on; while :; do sleep 0.01; done"
    )
    wait_for_output(host, sandbox, name, b"on\n")
    info = host.kill_command(sandbox.id, name)
    assert (info.killed, info.code, info.signal) == (True, 0, None)
    # Its shell may tell of the sleep that was killed, too.
    assert printed(host, sandbox, name).endswith(b"bye\n")


def test_killing_one_that_has_ended_changes_nothing(host: HostClient, sandbox: SandboxInfo) -> None:
    name = begin(host, sandbox, "exit 4")
    before = ended(host, sandbox, name)
    after = host.kill_command(sandbox.id, name)
    assert (after.code, after.killed) == (before.code, False) == (4, False)


def test_what_it_leaves_behind_lives_prints_and_can_be_killed(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    mark = own_mark()
    script = f"(until [ -e go ]; do sleep 0.02; done; echo later; exec sleep {mark}) & echo now"
    name = begin(host, sandbox, script)
    info = ended(host, sandbox, name)
    assert (info.code, info.active) == (0, True)
    host.write_file(sandbox.id, "/workspace/go", b"")
    wait_for_output(host, sandbox, name, b"now\nlater\n")
    for _ in eventually():
        if with_mark(mark):
            break
    info = host.kill_command(sandbox.id, name)
    assert (info.code, info.killed, info.active) == (0, False, False)
    assert with_mark(mark) == []


def test_it_outlives_a_killed_agent_and_its_launchers(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    script = "n=0; while [ ! -e stop ]; do n=$((n+1)); echo $n; sleep 0.01; done; exit 7"
    name = begin(host, sandbox, script)
    # Long enough to be there yet when the agent is not.
    through = begin(host, sandbox, "sleep 3; echo said; exit 9")
    wait_for_output(host, sandbox, name, b"3\n")
    launchers = agent.children()
    agent.kill()
    for _ in eventually():
        if not any(is_running(pid) for pid in launchers):
            break
    # This one ends while nobody is there.
    group = groups_of(agent, sandbox).background_group(through)
    assert is_populated(group)
    for _ in eventually():
        if not is_populated(group):
            break
    agent.start()
    info = host.command(sandbox.id, through)
    assert (info.running, info.code) == (False, 9)
    assert printed(host, sandbox, through) == b"said\n"
    assert host.command(sandbox.id, name).running
    reached = len(printed(host, sandbox, name))
    for _ in eventually():
        if len(printed(host, sandbox, name)) > reached:
            break
    host.write_file(sandbox.id, "/workspace/stop", b"")
    assert ended(host, sandbox, name).code == 7
    numbers = [int(line) for line in printed(host, sandbox, name).split()]
    assert numbers == list(range(1, len(numbers) + 1))


def test_it_outlives_an_agent_that_is_told_to_stop(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "until [ -e go ]; do sleep 0.02; done; echo on")
    agent.stop()
    agent.start()
    host.write_file(sandbox.id, "/workspace/go", b"")
    assert ended(host, sandbox, name).code == 0
    assert printed(host, sandbox, name) == b"on\n"
    mark = own_mark()
    killed = begin(host, sandbox, f"exec sleep {mark}")
    agent.kill()
    agent.start()
    assert host.kill_command(sandbox.id, killed).killed
    assert with_mark(mark) == []


def test_without_its_supervisor_it_is_killed(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    mark = own_mark()
    name = begin(host, sandbox, f"sleep {mark} & sleep {mark}")
    (pid,) = supervisors(agent, sandbox)
    os.kill(pid, signal.SIGKILL)
    # Although nobody asks.
    for _ in eventually():
        if not with_mark(mark):
            break
    info = ended(host, sandbox, name)
    assert (info.code, info.active) == (None, False)
    other = begin(host, sandbox, f"exec sleep {mark}")
    agent.kill()
    (pid,) = supervisors(agent, sandbox)
    os.kill(pid, signal.SIGKILL)
    agent.start()
    for _ in eventually():
        if not with_mark(mark):
            break
    assert not host.command(sandbox.id, other).running


def test_a_flood_is_bounded_on_disk_and_its_end_is_kept(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    lines = 3 * RING_BYTES // 16
    name = begin(host, sandbox, f"seq -f %015.0f {lines}")
    assert ended(host, sandbox, name).code == 0
    output = host.command_output(sandbox.id, name)
    assert output.size == lines * 16
    assert (len(output.data), output.offset) == (KEPT_BYTES, output.size - KEPT_BYTES)
    assert output.data[-32:] == b"%015d\n%015d\n" % (lines - 1, lines)
    first = output.offset // 16 + 1
    assert output.data[:16] == b"%015d\n" % first
    (log, _) = files_of(agent, sandbox)
    assert log.stat().st_blocks * 512 <= RING_BYTES + 64 * 1024


def test_its_output_counts_to_the_sandbox_and_unused_space_is_given_back(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    def used() -> int:
        text = host.exec(sandbox.id, Exec("stat -f -c '%b %f %S' /")).stdout.split()
        blocks, free, size = map(int, text)
        return (blocks - free) * size

    before = used()
    name = begin(host, sandbox, "echo x; until [ -e go ]; do sleep 0.02; done")
    assert used() - before >= RING_BYTES
    host.write_file(sandbox.id, "/workspace/go", b"")
    ended(host, sandbox, name)
    for _ in eventually():
        if used() - before < 128 * 1024:
            break


def test_no_space_for_its_output_is_said_and_leaves_nothing(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(disk_mb=64)
    host.exec(sandbox.id, Exec("dd if=/dev/zero of=/var/full bs=1M 2>/dev/null"))
    with pytest.raises(NoSpace, match="disk"):
        begin(host, sandbox, "true")
    assert files_of(agent, sandbox) == []
    host.exec(sandbox.id, Exec("rm /var/full"))
    assert ended(host, sandbox, begin(host, sandbox, "true")).code == 0


def test_it_pauses_with_the_sandbox_and_can_be_read_and_killed_meanwhile(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    name = begin(host, sandbox, "n=0; while :; do n=$((n+1)); echo $n; sleep 0.01; done")
    wait_for_output(host, sandbox, name, b"3\n")
    host.pause_sandbox(sandbox.id, far())
    for _ in eventually():
        reached = printed(host, sandbox, name)
        time.sleep(0.1)
        if printed(host, sandbox, name) == reached:
            break
    info = host.command(sandbox.id, name)
    assert info.running
    with pytest.raises(ContainerPaused):
        begin(host, sandbox, "true")
    host.resume_sandbox(sandbox.id, far())
    for _ in eventually():
        if len(printed(host, sandbox, name)) > len(reached):
            break
    host.pause_sandbox(sandbox.id, far())
    assert host.kill_command(sandbox.id, name).killed
    assert not host.command(sandbox.id, name).running
    assert not is_populated(groups_of(agent, sandbox).background_group(name))
    assert [each.id for each in host.background_commands(sandbox.id)] == [name]


def test_it_ends_with_the_sandbox_and_nothing_is_left(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    mark, sandbox = own_mark(), new_sandbox()
    names = [begin(host, sandbox, f"sleep {mark} & exec sleep {mark}") for _ in range(3)]
    watching = supervisors(agent, sandbox)
    assert len(watching) == len(names)
    assert len(files_of(agent, sandbox)) == 2 * len(names)
    container = container_of(agent.state, sandbox.id)
    host.delete_sandbox(sandbox.id)
    assert with_mark(mark) == []
    assert not any(is_running(pid) for pid in watching)
    assert groups_named(container) == []
    assert files_of(agent, sandbox) == []
    with pytest.raises(NotFound):
        host.command(sandbox.id, names[0])


def test_it_ends_with_a_container_that_exits_by_itself(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    name = begin(host, sandbox, "sleep 600")
    watching = supervisors(agent, sandbox)
    init = groups_of(agent, sandbox).init_pid()
    os.kill(init, signal.SIGKILL)
    for _ in eventually():
        if host.sandbox(sandbox.id).state == "gone":
            break
    assert not any(is_running(pid) for pid in watching)
    for call in (host.command, host.kill_command, host.command_output):
        with pytest.raises(ContainerGone):
            call(sandbox.id, name)
    assert files_of(agent, sandbox) == []


def test_there_are_limits_on_how_many_run_and_how_many_are_known(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    names = [begin(host, sandbox, "exec sleep 600") for _ in range(MAX_ACTIVE)]
    with pytest.raises(TooManyCommands, match="Stop one") as refused:
        begin(host, sandbox, "true")
    assert refused.value.running == MAX_ACTIVE
    host.kill_command(sandbox.id, names[0])
    for _ in range(MAX_REMEMBERED):
        last = begin(host, sandbox, "true")
        for _ in eventually():
            if not host.command(sandbox.id, last).active:
                break
    known = [each.id for each in host.background_commands(sandbox.id)]
    assert len(known) == MAX_REMEMBERED
    assert known[0] == last
    assert set(names[1:]) <= set(known)
    assert names[0] not in known
    assert len(files_of(agent, sandbox)) == 2 * MAX_REMEMBERED
    # Started at once, they are counted one by one.
    for name in names[1:]:
        host.kill_command(sandbox.id, name)
    with ThreadPoolExecutor(2 * MAX_ACTIVE) as pool:
        started = list(pool.map(lambda _: _starts(host, sandbox), range(2 * MAX_ACTIVE)))
    assert sum(started) == MAX_ACTIVE


def _starts(host: HostClient, sandbox: SandboxInfo) -> bool:
    try:
        begin(host, sandbox, "exec sleep 600")
    except TooManyCommands:
        return False
    return True


def test_a_supervisor_is_small_and_holds_nothing_but_its_own(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    begin(host, sandbox, "exec sleep 600")
    (pid,) = supervisors(agent, sandbox)
    opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    assert sum("commands/" in path for path in opened) == 2
    assert not [path for path in opened if path.endswith("agent.pid") or "socket" in path]
    assert len(opened) <= 8
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split("\n")
    private = sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
    assert private < MAX_PRIVATE_KIB
    inside = host.exec(sandbox.id, Exec("cat /proc/[0-9]*/cmdline")).stdout
    assert TITLE.encode() not in inside


def test_it_is_none_of_those_that_are_killed_with_an_agent_that_hangs(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    begin(host, sandbox, "exec sleep 600")
    (pid,) = supervisors(agent, sandbox)
    assert pid not in process_tree(agent.pid)
    assert os.getsid(pid) == pid != os.getsid(agent.pid)


def test_a_snapshot_is_taken_while_one_writes_and_its_sandbox_has_none(
    agent: Agent, host: HostClient, sandbox: SandboxInfo, new_sandbox: NewSandbox
) -> None:
    name = begin(host, sandbox, "n=0; while :; do n=$((n+1)); echo $n; done")
    snapshot = f"snap_{sandbox.id}"
    host.create_snapshot(snapshot, sandbox.id)
    try:
        reached = host.command_output(sandbox.id, name).size
        for _ in eventually():
            if host.command_output(sandbox.id, name).size > reached:
                break
        fork = new_sandbox(image="", snapshot=snapshot)
        assert host.background_commands(fork.id) == []
        # What came with the snapshot is removed.
        assert files_of(agent, fork) == []
        other = begin(host, fork, "echo fork")
        ended(host, fork, other)
        assert printed(host, fork, other) == b"fork\n"
        assert len(files_of(agent, fork)) == 2
    finally:
        host.delete_snapshot(snapshot)


def test_starting_and_deleting_at_once_leaves_nothing(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    mark = own_mark()
    for delay in (0.0, 0.005, 0.02):
        sandbox = new_sandbox()
        container = container_of(agent.state, sandbox.id)

        def starts(sandbox: SandboxInfo = sandbox) -> None:
            for _ in range(5):
                with suppress(HostError):
                    begin(host, sandbox, f"exec sleep {mark}")

        threads = [threading.Thread(target=starts) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        host.delete_sandbox(sandbox.id)
        for thread in threads:
            thread.join()
        for _ in eventually():
            if not with_mark(mark):
                break
        assert groups_named(container) == []
        assert files_of(agent, sandbox) == []


def test_a_killed_agent_in_the_middle_of_a_start_leaves_it_whole_or_not_at_all(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    mark = own_mark()
    for delay in (0.0, 0.004, 0.01, 0.02):
        name = f"cmd_torn{delay * 1000:.0f}"

        def starts(name: str = name) -> None:
            with suppress(HostError, HostUnavailable):
                host.start_command(sandbox.id, StartCommand(name, f"exec sleep {mark}"))

        thread = threading.Thread(target=starts)
        thread.start()
        time.sleep(delay)
        agent.kill()
        thread.join()
        agent.start()
        known = {each.id: each for each in host.background_commands(sandbox.id)}
        if name in known and known[name].running:
            host.kill_command(sandbox.id, name)
        for _ in eventually():
            if not with_mark(mark):
                break
