"""One sandbox takes all that the kernel counts: what its neighbour and the host notice of it.

Every container's user namespace is made by the container's own root (hostruntime.container.lxc), so
what is counted for users is counted apart; of what the machine has once, a container gets a part.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostruntime.container.cgroups import ContainerGroups, cgroup_layout
from hostruntime.container.shared_limits import low_limits, max_processes
from hostruntime.errors import NotFound
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import FileContent
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import REPO, Agent, eventually
from tests.host.attackers import PLACE
from tests.host.attacks.counted import AT_A_LIMIT, HOARDED, TAKEN, THINGS
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.host.warm import create_from_warm, keeping_warm

pytestmark = pytest.mark.host

NOBODY = 65_534
VIEWERS = ("the neighbour", "the host's root", "the host's nobody")
# What is loaded, is loaded while it may still be read.
_ON_THE_HOST = """
import os, sys
from tests.host.attacks import counted
user = int(sys.argv[1])
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
counted.look()
"""
# What no container gets any of, and how it is refused.
REFUSED = {"asynchronous I/O": "ENOSYS"}
# Of what would go on until the memory ends, the program takes only so many; timers are signals.
UNBOUNDED = {"connections", "open files", "timers"}
type Told = dict[str, str]


@dataclass(frozen=True)
class Siege:
    """What the hoarder says it took, by user, and what each viewer could have before and beside."""

    hoarded: dict[str, list[tuple[int, str]]]
    before: dict[str, Told]
    beside: dict[str, Told]


def inside(host: HostClient, sandbox: SandboxInfo, word: str) -> bytes:
    env = {"PYTHONPATH": PLACE, "PYTHONDONTWRITEBYTECODE": "1"}
    argv = ["python3", "-m", "tests.host.attacks.counted", word]
    result = host.exec(sandbox.id, Exec(argv, env=env, timeout_seconds=300))
    assert result.code == 0, result.stderr.decode()[-2000:]
    return result.stdout


def on_the_host(user: int) -> Told:
    argv = [sys.executable, "-c", _ON_THE_HOST, str(user)]
    done = subprocess.run(argv, cwd=REPO, check=True, stdout=subprocess.PIPE, timeout=60)
    return dict(json.loads(done.stdout))


def views(host: HostClient, neighbour: SandboxInfo) -> dict[str, Told]:
    beside = json.loads(inside(host, neighbour, "look"))
    told: tuple[Told, ...] = (beside, on_the_host(0), on_the_host(NOBODY))
    return dict(zip(VIEWERS, told, strict=True))


def hoarded_by(host: HostClient, sandbox: SandboxInfo) -> dict[str, list[tuple[int, str]]] | None:
    try:
        found = host.read_path(sandbox.id, str(HOARDED))
    except NotFound:
        return None
    assert isinstance(found, FileContent)
    return dict(json.loads(found.content))


@pytest.fixture(scope="module", params=["cold", "warm"])
def siege(request: pytest.FixtureRequest, agent: Agent, attackers: str) -> Iterator[Siege]:
    host = agent.client
    wanted = [
        CreateSandbox(name, image=attackers, cpu=1.0, memory_mb=1024, network="off")
        for name in ("sbx_hoarder", "sbx_neighbour")
    ]
    if request.param == "warm":
        with keeping_warm(agent):
            hoarder, neighbour = (create_from_warm(agent, each) for each in wanted)
    else:
        hoarder, neighbour = map(host.create_sandbox, wanted)
    try:
        before = views(host, neighbour)
        with ThreadPoolExecutor(1) as pool:
            hoarding = pool.submit(inside, host, hoarder, "hoard")
            for _ in eventually(200):
                assert not hoarding.done(), hoarding.result()
                if (hoarded := hoarded_by(host, hoarder)) is not None:
                    break
            assert hoarded is not None
            beside = views(host, neighbour)
            assert not hoarding.done(), "it was all held until here"
            host.delete_sandbox(hoarder.id)
        yield Siege(hoarded, before, beside)
    finally:
        for sandbox in (hoarder, neighbour):
            host.delete_sandbox(sandbox.id)


@pytest.mark.parametrize("thing", THINGS)
def test_what_one_sandbox_takes_all_of_is_there_for_its_neighbour_and_the_host(
    siege: Siege, thing: str
) -> None:
    counts, ends = zip(*siege.hoarded[thing], strict=True)
    if thing in REFUSED:
        assert (sum(counts), set(ends)) == (0, {REFUSED[thing]})
    else:
        # The proof that it ran: some were had, and all who took came to an end of it.
        assert sum(counts) > 0
        assert AT_A_LIMIT.issuperset(ends) or thing in UNBOUNDED, ends
    for viewer in VIEWERS:
        before, beside = siege.before[viewer][thing], siege.beside[viewer][thing]
        none = thing in REFUSED and viewer == "the neighbour"
        assert before == (REFUSED[thing] if none else TAKEN), "it works at all"
        assert beside == before, f"{viewer} gets no more of it"


# More than a small sandbox has memory, in sockets that nobody reads.
_FILL = """
import os, socket, time
held = []
for _ in range(640):
    here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    here.bind(("127.0.0.1", 0))
    there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    there.connect(here.getsockname())
    held.append((here, there, [there.send(bytes(60_000)) for _ in range(4)]))
open("/workspace/filled", "w").close()
while not os.path.exists("/workspace/go"):
    time.sleep(0.05)
"""


def test_what_is_in_sockets_is_bounded_by_the_sandboxs_size(
    agent: Agent, host: HostClient, attackers: str, new_sandbox: NewSandbox
) -> None:
    small = new_sandbox(image=attackers, memory_mb=64, network="off")
    groups = cgroup_layout().container(f"{agent.prefix}{small.id}")
    with ThreadPoolExecutor(1) as pool:
        filling = pool.submit(
            host.exec, small.id, Exec(["python3", "-c", _FILL], timeout_seconds=120)
        )
        for _ in eventually(100):
            if filling.done() or host.stat(small.id, "/workspace/filled").exists:
                break
        if filling.done():
            # In cgroup v2 it is the sandbox's memory like all other.
            assert filling.result().out_of_memory
            return
        taken, most = in_sockets(groups)
        host.write_file(small.id, "/workspace/go", b"")
        assert filling.result().code == 0
    assert most / 2 < taken <= most


def in_sockets(groups: ContainerGroups) -> tuple[int, int]:
    """What a container's sockets hold, and may, in bytes, or its memory where that is counted."""
    group, memory = groups.memory_group(), groups.memory_bytes()
    if groups.layout.kind == "v2":
        assert memory is not None
        return memory, int((group / "memory.max").read_text())
    names = (f"memory.kmem.tcp.{what}_in_bytes" for what in ("usage", "limit"))
    taken, most = (int((group / name).read_text()) for name in names)
    return taken, min(most, 64 << 20)


def test_all_sandboxes_together_leave_the_host_what_it_needs(agent: Agent) -> None:
    """What is not counted for users, but once for the machine."""
    assert low_limits() == [], "it was raised when the agent started"
    group = cgroup_layout().pids_group(agent.prefix)
    assert int((group / "pids.max").read_text()) == max_processes()
    assert max_processes() < int(Path("/proc/sys/kernel/threads-max").read_text())
