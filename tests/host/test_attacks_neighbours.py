"""Two containers at once: nothing of the one is to be found, named or reached from the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, pids_under
from hostruntime.host.ids import HIGH_IDS, IDS_PER_SLOT
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.attackers import PLACE
from tests.host.attacks.neighbour import FILES
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

THINGS = (
    *FILES,
    *("abstract socket", "abstract socket's name", "port"),
    *("shared memory", "semaphores", "messages", "message queue"),
    *("/proc/sysvipc/shm", "/proc/sysvipc/sem", "/proc/sysvipc/msg"),
    *("command line", "environment"),
)
_SECRET = {"NEIGHBOURS_SECRET": "hunter2"}


@pytest.fixture(scope="module")
def pair(agent: Agent, attackers: str) -> Iterator[tuple[SandboxInfo, SandboxInfo]]:
    """The one that leaves things, and the one that looks."""
    made = [
        agent.client.create_sandbox(
            CreateSandbox(name, image=attackers, cpu=1.0, memory_mb=256, network="off")
        )
        for name in ("sbx_left", "sbx_looker")
    ]
    yield made[0], made[1]
    for sandbox in made:
        agent.client.delete_sandbox(sandbox.id)


def program(host: HostClient, sandbox: SandboxInfo, word: str, **env: str) -> bytes:
    argv = ["python3", "-m", "tests.host.attacks.neighbour", word]
    environment = {"PYTHONPATH": PLACE, "PYTHONDONTWRITEBYTECODE": "1", **env}
    result = host.exec(sandbox.id, Exec(argv, env=environment))
    assert result.code == 0, result.stderr.decode()[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def seen(agent: Agent, pair: tuple[SandboxInfo, SandboxInfo]) -> dict[str, list[str]]:
    """What is found beside the one that leaves things, in its own container and in the other."""
    host, (one, other) = agent.client, pair
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(program, host, one, "leave", **_SECRET)
        for _ in eventually():
            assert not leaving.done(), leaving.result()
            if host.stat(one.id, "/workspace/ready").exists:
                break
        found = {
            "inside": json.loads(program(host, one, "look")),
            "outside": json.loads(program(host, other, "look")),
        }
        host.write_file(one.id, "/workspace/stop", b"")
        leaving.result()
    return found


@pytest.mark.parametrize("thing", THINGS)
def test_what_one_container_leaves_another_does_not_find(
    seen: dict[str, list[str]], thing: str
) -> None:
    assert thing in seen["inside"], "it was there to be found"
    assert thing not in seen["outside"]


def host_status(agent: Agent, sandbox: SandboxInfo) -> Path:
    group = cgroup_layout().container(f"{agent.prefix}{sandbox.id}")
    pid = group.init_pid()
    assert pid is not None
    assert pid in pids_under(group.unified)
    return Path(f"/proc/{pid}")


@pytest.mark.parametrize("kind", ["mnt", "net", "pid", "uts", "ipc", "user", "cgroup"])
def test_every_container_has_namespaces_of_its_own(
    agent: Agent, pair: tuple[SandboxInfo, SandboxInfo], kind: str
) -> None:
    places = [host_status(agent, sandbox) for sandbox in pair] + [Path("/proc/self")]
    assert len({str((place / "ns" / kind).readlink()) for place in places}) == 3


def test_the_ranges_of_ids_are_apart(agent: Agent, pair: tuple[SandboxInfo, SandboxInfo]) -> None:
    bases = []
    for sandbox in pair:
        for name in ("uid_map", "gid_map"):
            own, far = (host_status(agent, sandbox) / name).read_text().splitlines()
            inside, outside, count = map(int, own.split())
            assert (inside, count) == (0, IDS_PER_SLOT)
            bases.append(outside)
            # Owners of files alone, the same for all: no process's, and beyond every slot's.
            assert tuple(map(int, far.split())) == HIGH_IDS
            assert outside + count <= HIGH_IDS[1]
    assert bases[0] == bases[1]
    assert bases[2] == bases[3]
    assert abs(bases[0] - bases[2]) >= IDS_PER_SLOT


def test_no_mount_is_shared(agent: Agent, pair: tuple[SandboxInfo, SandboxInfo]) -> None:
    """By device and root (mountinfo in proc(5)), the nodes of /dev among them."""
    mounts = []
    for sandbox in pair:
        lines = (host_status(agent, sandbox) / "mountinfo").read_text().splitlines()
        mounts.append({tuple(line.split()[2:4]): line for line in lines})
    assert {key: mounts[0][key] for key in mounts[0].keys() & mounts[1].keys()} == {}
    nodes = {root for _, root in mounts[0]}
    assert {"/full", "/null", "/random", "/tty", "/urandom", "/zero"} <= nodes


# Each was one inode of the host's for all containers.
NODES = """
import fcntl, json, os, sys
paths = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx")]
taken = []
for path in paths:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        continue
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        continue
    taken.append(path)
print(json.dumps(taken), flush=True)
if sys.argv[1:]:
    open("/workspace/locked", "w").close()
    while not os.path.exists("/workspace/unlock"):
        import time; time.sleep(0.05)
"""


def test_locks_on_devices_say_nothing_to_another_container(
    agent: Agent, pair: tuple[SandboxInfo, SandboxInfo]
) -> None:
    """Nor do events of inotify, which are an inode's, too."""
    host, (one, other) = agent.client, pair

    def locks(sandbox: SandboxInfo, *words: str) -> list[str]:
        done = host.exec(sandbox.id, Exec(["python3", "-c", NODES, *words]))
        assert done.code == 0, done.stderr
        return list(json.loads(done.stdout.splitlines()[0]))

    free = locks(other)
    assert {"/dev/null", "/dev/urandom"} <= set(free)
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(locks, one, "hold")
        for _ in eventually():
            assert not holding.done(), holding.result()
            if host.stat(one.id, "/workspace/locked").exists:
                break
        try:
            # The control: in its own container they are held.
            assert "/dev/urandom" not in locks(one)
            assert locks(other) == free
        finally:
            host.write_file(one.id, "/workspace/unlock", b"")
        assert set(holding.result()) == set(free)


def test_a_container_of_another_uid_cannot_signal_or_look_from_the_host_side(
    agent: Agent, pair: tuple[SandboxInfo, SandboxInfo]
) -> None:
    """Even with the other's namespaces in reach, its ids would have no power there."""
    one, other = (host_status(agent, sandbox) for sandbox in pair)
    uid = int((one / "uid_map").read_text().split()[1])
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            os.kill(int(other.name), 0)
        except PermissionError:
            os._exit(13)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 13


def test_ids_of_sandboxes_are_not_names_of_anything_inside(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    """The same hostname, machine and boot for all; nothing to count others by."""
    told = []
    for sandbox in (new_sandbox(), new_sandbox()):
        words = "hostname; cat /proc/sys/kernel/random/boot_id; cat /etc/hosts /etc/machine-id"
        told.append(host.exec(sandbox.id, Exec(words)).stdout.splitlines())
        assert sandbox.id.encode() not in b" ".join(told[-1])
    assert told[0][0] == told[1][0] == b"sandbox"
    assert told[0][1] != told[1][1], "a boot id of its own"
