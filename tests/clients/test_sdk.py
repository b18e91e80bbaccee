"""The official Python SDK, unmodified, against our server."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from orkestr import OrkestrClient, Sandbox, Snapshot
from orkestr.errors import (
    APIError,
    AuthError,
    ExecTimeout,
    OrkestrError,
    SandboxNotFound,
    SandboxNotReady,
)

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack

BASES = ("debian-12", "python-3.12-bare", "python-3.12", "node-22")


@pytest.mark.parametrize(
    ("base", "command", "expected"),
    [
        ("debian-12", ". /etc/os-release && echo $VERSION_ID", "12"),
        ("ubuntu-24.04", "command -v apt-get", "/usr/bin/apt-get"),
        ("python-3.12-bare", "python -c 'import sys; print(sys.version_info[:2])'", "(3, 12)"),
        ("python-3.12", "python3 -c 'import ssl, sqlite3, lzma; print(1)'", "1"),
        ("node-22", "node -p 'process.versions.node.split(\".\")[0]'", "22"),
    ],
)
def test_every_built_in_base_boots_and_is_what_it_says(
    sandboxes: Sandboxes, base: str, command: str, expected: str
) -> None:
    done = sandboxes.boot(base).exec(command)
    assert (done.stdout.strip(), done.exit_code) == (expected, 0), done.stderr


def test_output_streams_exit_code_directory_and_environment_are_kept_apart(
    sandbox: Sandbox,
) -> None:
    done = sandbox.exec(
        "echo out; echo err >&2; pwd; echo $GREETING; exit 3", env={"GREETING": "hi"}
    )
    assert done.stdout == "out\n/workspace\nhi\n"
    assert done.stderr == "err\n"
    assert done.exit_code == 3
    assert done.duration_ms >= 0
    assert sandbox.exec("pwd", cwd="/usr").stdout == "/usr\n"


def test_a_sandboxes_own_environment_reaches_every_command(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.boot("debian-12", env={"COLOUR": "blue"})
    assert sandbox.exec("echo $COLOUR").stdout == "blue\n"
    assert sandbox.exec("echo $COLOUR", env={"COLOUR": "red"}).stdout == "red\n"


def test_streamed_output_arrives_while_the_command_runs(sandbox: Sandbox) -> None:
    """The second part is not written before the first has been read."""
    arrived: list[tuple[str, str]] = []
    command = "echo first; until [ -e read ]; do sleep 0.02; done; echo last >&2; exit 4"
    for chunk in sandbox.exec_stream(command, timeout_seconds=60):
        arrived.append((chunk.stream, chunk.data))
        if len(arrived) == 1:
            sandbox.files.write("/workspace/read", "")
        final = chunk
    assert arrived[:-1] == [("stdout", "first\n"), ("stderr", "last\n")]
    assert final.is_final
    assert final.exit_code == 4


def test_a_command_over_its_time_is_ended_with_its_children(sandbox: Sandbox) -> None:
    with pytest.raises(ExecTimeout):
        sandbox.exec("trap '' TERM; sleep 98765 & sleep 98765", timeout_seconds=1)
    assert sandbox.exec("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 9876[5]").stdout == "0\n"


def test_a_command_may_take_longer_than_the_sdk_waits(sandbox: Sandbox) -> None:
    """It gives up on 30 s of silence; interim answers are none."""
    done = sandbox.exec("sleep 40; echo done", timeout_seconds=100)
    assert (done.stdout, done.exit_code) == ("done\n", 0)


def test_much_output_is_whole_or_says_that_it_is_not(sandbox: Sandbox) -> None:
    done = sandbox.exec("head -c 15000000 /dev/zero | tr '\\0' a; echo END")
    assert len(done.stdout) == 15_000_004
    done = sandbox.exec("head -c 20000000 /dev/zero | tr '\\0' a; echo END")
    assert "was left out here" in done.stdout[-200:]


def test_a_streamed_command_over_its_time_says_so(sandbox: Sandbox) -> None:
    with pytest.raises(ExecTimeout):
        list(sandbox.exec_stream("echo started; sleep 60", timeout_seconds=1))


def test_files_are_written_read_listed_moved_and_deleted(sandbox: Sandbox) -> None:
    files = sandbox.files
    files.write("/workspace/notes.txt", "grüße\n")
    files.write_bytes("/tmp/raw", bytes(range(256)), mode=0o600)
    assert files.read("/workspace/notes.txt") == "grüße\n"
    assert files.read_bytes("/tmp/raw") == bytes(range(256))
    assert sandbox.exec("cat /workspace/notes.txt").stdout == "grüße\n"
    assert sandbox.exec("stat -c %a /tmp/raw").stdout == "600\n"
    files.mkdir("/workspace/deep/er")
    files.move("/workspace/notes.txt", "/workspace/deep/er/notes.txt")
    assert [entry.name for entry in files.list("/workspace/deep/er")] == ["notes.txt"]
    assert files.stat("/workspace/deep").is_dir
    assert not files.exists("/workspace/notes.txt")
    files.delete("/workspace/deep/er/notes.txt")
    assert not files.exists("/workspace/deep/er/notes.txt")


def test_a_batch_of_files_reports_each_one(sandbox: Sandbox) -> None:
    results = sandbox.files.write_batch({"/workspace/a": "1", "/etc/passwd": "no"})
    assert [(result.path, result.error is None) for result in results] == [
        ("/workspace/a", True),
        ("/etc/passwd", False),
    ]
    assert sandbox.files.read("/workspace/a") == "1"


def test_files_outside_the_writable_roots_are_refused(sandbox: Sandbox) -> None:
    with pytest.raises(OrkestrError) as caught:
        sandbox.files.write("/etc/hosts", "x")
    assert caught.value.status_code in {400, 403}
    assert sandbox.exec("grep -c ^x$ /etc/hosts").stdout == "0\n"


def test_reading_a_file_that_is_not_there_says_so(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxNotFound):
        sandbox.files.read("/workspace/nothing")


def test_lists_filter_by_status_and_metadata(sandboxes: Sandboxes, sdk: OrkestrClient) -> None:
    alice = sandboxes.boot("debian-12", metadata={"user": "alice", "kind": "x"})
    bob = sandboxes.boot("debian-12", metadata={"user": "bob", "kind": "x"})
    both = Sandbox.list(metadata={"kind": "x"}, status="running", limit=1, client=sdk)
    assert [found.id for found in both] == [bob.id, alice.id]
    only = Sandbox.list(metadata={"kind": "x", "user": "alice"}, client=sdk)
    assert [found.id for found in only] == [alice.id]
    assert only[0].metadata == {"user": "alice", "kind": "x"}


def test_a_terminated_sandbox_stays_in_history_and_takes_no_command(
    sandbox: Sandbox, sdk: OrkestrClient
) -> None:
    sandbox.terminate()
    sandbox.terminate()
    assert Sandbox.get(sandbox.id, client=sdk).status == "terminated"
    with pytest.raises(SandboxNotReady):
        sandbox.exec("true")


def test_a_lifetime_runs_out_and_can_be_extended(sandboxes: Sandboxes, sdk: OrkestrClient) -> None:
    short = sandboxes.boot("debian-12", timeout_seconds=10)
    longer = sandboxes.boot("debian-12", timeout_seconds=10)
    longer.set_timeout(60)
    assert longer.expires_at - datetime.now(UTC) > timedelta(seconds=50)
    deadline = time.monotonic() + 20
    while Sandbox.get(short.id, client=sdk).status == "running":
        assert time.monotonic() < deadline, "it outlived its time"
        time.sleep(0.2)
    assert Sandbox.get(short.id, client=sdk).status == "terminated"
    assert longer.exec("echo alive").stdout == "alive\n"


def test_without_a_network_there_is_none(sandbox: Sandbox) -> None:
    done = sandbox.exec("ls /sys/class/net; cat /proc/net/route | wc -l")
    assert done.stdout.split()[0] == "lo"
    assert sandbox.exec("(echo > /dev/tcp/10.0.0.1/80) 2>&1", timeout_seconds=10).exit_code != 0


def test_errors_map_to_the_sdks_exceptions(
    stack: Stack, sdk: OrkestrClient, templates: Templates
) -> None:
    with pytest.raises(SandboxNotFound):
        Sandbox.get("sbx_01ARZ3NDEKTSV4RRFFQ69G5FAV", client=sdk)
    with pytest.raises(AuthError) as refused:
        Sandbox.list(client=OrkestrClient(api_key="ork_wrong_key", base_url=stack.url))
    assert refused.value.status_code == 401
    building = templates.create("debian-12", "sleep 5")
    with pytest.raises(SandboxNotReady):
        Sandbox.create(template=building, client=sdk)
    with pytest.raises(APIError) as unknown:
        Sandbox.create(template="no-such-base", client=sdk)
    assert unknown.value.status_code in {400, 404}
    assert unknown.value.request_id


def test_limits_describe_the_team_plan(sdk: OrkestrClient) -> None:
    limits = Sandbox.limits(client=sdk)
    assert limits.plan == "team"
    assert limits.max_concurrent >= 5
    assert {size.size for size in limits.sizes} == {"small", "medium", "large"}
    assert limits.default_egress_domains


def test_a_snapshot_is_taken_listed_forked_and_deleted(sandboxes: Sandboxes) -> None:
    source = sandboxes.boot("debian-12", size="small")
    source.exec("echo before | tee /root/mark /tmp/mark >/workspace/mark")
    taken = source.snapshot(name="kept")
    source.exec("echo after | tee /root/mark /tmp/mark >/workspace/mark")
    assert (taken.status, taken.name, taken.source_sandbox_id) == ("ready", "kept", source.id)
    assert taken.created_at is not None
    assert taken.ready_at is not None
    assert Snapshot.get(taken.id, client=sandboxes.client) == taken
    assert taken in Snapshot.list(client=sandboxes.client)
    forks = [Sandbox.create(snapshot=taken.id, client=sandboxes.client) for _ in range(2)]
    sandboxes.booted += forks
    for fork in forks:
        done = fork.exec("cat /root/mark /tmp/mark /workspace/mark; echo mine >/root/mark")
        assert done.stdout.split() == ["before"] * 3
    assert source.exec("cat /root/mark").stdout == "after\n"
    for _ in range(2):
        Snapshot.delete(taken.id, client=sandboxes.client)
    assert taken.id not in [one.id for one in Snapshot.list(client=sandboxes.client)]
    with pytest.raises(OrkestrError):
        Sandbox.create(snapshot=taken.id, client=sandboxes.client)
