"""The process that loads rules for the agent: for any agent, and whatever becomes of either."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostruntime.errors import HostFault
from hostruntime.network.nft_process import NftProcess
from tests.host.agent import REPO, eventually, is_running
from tests.processes import open_files

pytestmark = pytest.mark.host

MANY = 2048
SET = "{ type ipv4_addr; elements = { 192.0.2.1 } }"
# An agent with so many descriptors that select(2) cannot wait for the next.
AGENT = f"""\
import os, resource, sys, time
from pathlib import Path
from hostruntime.network.nft_process import NftProcess
resource.setrlimit(resource.RLIMIT_NOFILE, ({MANY + 64}, {MANY + 64}))
for _ in range({MANY}):
    os.dup(0)
os.unshare(os.CLONE_NEWNET)
nft = NftProcess(Path(sys.argv[1]))
nft.run("add table ip first")
print(nft._started[0].pid, nft.run("list tables"), flush=True)
time.sleep(600)
"""


@pytest.fixture
def nft(tmp_path: Path) -> Iterator[NftProcess]:
    process = NftProcess(tmp_path / "log")
    yield process
    process.close()


def pid_of(nft: NftProcess) -> int:
    assert nft._started is not None
    return nft._started[0].pid


def elsewhere[R](action: Callable[[], R]) -> R:
    """Carry out an action in a network namespace of its own."""

    def act() -> R:
        os.unshare(os.CLONE_NEWNET)
        return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result()


def namespace_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def test_it_works_in_the_namespace_of_the_caller_and_keeps_nothing_of_it(nft: NftProcess) -> None:
    def load() -> str:
        nft.run(f"add table ip mine; add set ip mine one {SET}")
        return nft.run("list set ip mine one", as_json=True)

    listed = json.loads(elsewhere(load))["nftables"]
    assert [item["set"]["elem"] for item in listed if "set" in item] == [["192.0.2.1"]]
    assert namespace_of(pid_of(nft)) == namespace_of(os.getpid())
    kinds = sorted(name.partition(":")[0] for name in open_files(pid_of(nft)))
    assert kinds == sorted(["/dev/null", *[nft._log.as_posix()] * 2, "net", "socket"])
    with pytest.raises(HostFault, match="No such file"):
        elsewhere(lambda: nft.run("list table ip mine"))
    with pytest.raises(HostFault, match="syntax error"):
        elsewhere(lambda: nft.run("add everything"))
    first = pid_of(nft)
    nft.close()
    assert not is_running(first)


def test_one_that_is_killed_at_work_or_ended_by_the_library_is_replaced(nft: NftProcess) -> None:
    elsewhere(lambda: nft.run("add table ip first"))
    stopped, loaded = pid_of(nft), threading.Event()
    os.kill(stopped, signal.SIGSTOP)

    def load() -> None:
        elsewhere(lambda: nft.run("add table ip second"))
        loaded.set()

    caller = threading.Thread(target=load)
    caller.start()
    assert not loaded.wait(0.2)
    os.kill(stopped, signal.SIGKILL)
    caller.join(60)
    assert loaded.is_set()
    assert not is_running(stopped)
    # The library calls exit(3) if it gets no socket: the caller's namespace takes the last number.
    replaced = pid_of(nft)
    resource.prlimit(replaced, resource.RLIMIT_NOFILE, (4, 4))
    assert "third" in elsewhere(lambda: nft.run("add table ip third; list tables"))
    assert pid_of(nft) != replaced


def test_an_agent_with_two_thousand_descriptors_loads_rules_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path / "log")], cwd=REPO, stdout=subprocess.PIPE
    )
    try:
        assert agent.stdout is not None
        pid, *listed = agent.stdout.readline().split()
        assert listed == [b"table", b"ip", b"first"]
        assert len(open_files(int(pid))) < 8
    finally:
        agent.kill()
        agent.communicate()
    for _ in eventually():
        if not is_running(int(pid)):
            break
