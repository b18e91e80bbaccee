"""A running agent in the namespaces' world: it keeps its proxy and its firewall by itself."""

from __future__ import annotations

import json
import os
import signal
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.run import run
from hostruntime.host.rundir import RunDir
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.network.firewall import PROXY_PORT
from hostruntime.network.firewall_watch import count_table_parts
from hostruntime.network.netns import run_in_namespace
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, an_agent, is_running
from tests.host.network import wait_until
from tests.host.network import world as world
from tests.host.smalltree import PYTHON, make_small_tree
from tests.host.topology import GREETING, INTERNET, RESOLVER, World, through_proxy

pytestmark = pytest.mark.host

IMAGE = "img_small"
# Twice the agent's own period, and what a proxy takes to start.
SOON = 20.0
NUMBERS = count(1)
ASK = """
import os, socket, ssl, urllib.parse
proxy = urllib.parse.urlsplit(os.environ["HTTPS_PROXY"])
try:
    with socket.create_connection((proxy.hostname, proxy.port), 3) as plain:
        plain.sendall(b"CONNECT allowed.test:443 HTTP/1.1\\r\\n\\r\\n")
        status = plain.recv(4000).split()[1].decode()
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with context.wrap_socket(plain, server_hostname="allowed.test") as tunnel:
            print(tunnel.recv(100).decode(), end="")
except OSError as error:
    print("closed", error)
"""
DIRECT = f"""
import socket
try:
    print(socket.create_connection(({INTERNET!r}, 80), 3).recv(100).decode(), end="")
except OSError as error:
    print("closed", error)
"""


@pytest.fixture(scope="module")
def live(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent whose outside is the world, with an image to run Python in."""
    state = tmp_path_factory.mktemp("live")
    store = ImageStore(StatePaths(state).ensure())
    staged = store.create_staging(IMAGE)
    make_small_tree(staged / "tree")
    store.publish(staged, ImageManifest(IMAGE, "base", None, time.time(), 0, 0, 0))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ORKESTR_DNS", RESOLVER)
        with an_agent(state) as agent:
            yield agent


@pytest.fixture
def box(live: Agent) -> Iterator[Callable[[str], str]]:
    """Makes sandboxes of a mode."""
    made: list[str] = []

    def make(mode: str) -> str:
        name = f"sbx_live{next(NUMBERS)}"
        listed = ["allowed.test"] if mode == "restricted" else None
        wanted = CreateSandbox(
            name, image=IMAGE, cpu=1.0, memory_mb=256, network=mode, allow_domains=listed
        )
        live.client.create_sandbox(wanted)
        made.append(name)
        return name

    yield make
    for name in made:
        live.client.delete_sandbox(name)


def says(live: Agent, name: str, source: str) -> bytes:
    argv = [PYTHON, "-c", textwrap.dedent(source)]
    return live.client.exec(name, Exec(argv, cwd="/root", timeout_seconds=20)).stdout


def instance(live: Agent) -> Instance:
    return Instance(live.client.health().instance)


def squid(number: Instance) -> list[int]:
    """Squid's processes by what the agent's directory says: the one recorded, and its child."""
    recorded = int((RunDir.of(number).egress / "squid.pid").read_text())
    children = Path(f"/proc/{recorded}/task/{recorded}/children").read_text().split()
    return [recorded, *(int(pid) for pid in children if _is_squid(int(pid)))]


def _is_squid(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().strip() == "squid"


def kill_squid(number: Instance) -> None:
    killed = squid(number)
    assert all(_is_squid(pid) for pid in killed)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in killed), 2)


def test_what_is_tried_past_the_proxy_is_heard_of(live: Agent, box: Callable[[str], str]) -> None:
    name, near = box("restricted"), box("restricted")
    name_asked = "import socket\ntry: socket.gethostbyname('elsewhere.test')\nexcept OSError: pass"
    says(live, name, name_asked)
    assert says(live, name, DIRECT).startswith(b"closed")
    uses = live.client.egress_hosts(name)
    # DNS names no port.
    assert {(use.host, use.port) for use in uses} == {("elsewhere.test", 0), (INTERNET, 80)}
    assert all(use.direct and use.refused for use in uses)
    assert live.client.egress_hosts(near) == []


def test_a_killed_proxy_is_closed_and_comes_back(live: Agent, box: Callable[[str], str]) -> None:
    name, number = box("restricted"), instance(live)
    assert says(live, name, ASK) == GREETING
    before = squid(number)
    kill_squid(number)
    assert says(live, name, DIRECT).startswith(b"closed")
    wait_until(lambda: says(live, name, ASK) == GREETING, SOON)
    assert not set(squid(number)) & set(before)
    assert live.client.health().proxy["healthy"]


def test_a_proxy_killed_while_the_agent_is_dead_stays_closed_until_it_is_back(
    live: Agent, box: Callable[[str], str]
) -> None:
    name, number = box("restricted"), instance(live)
    where = (str(number.subnet.network_address + 1), PROXY_PORT)
    namespace = namespace_of(number, name)
    live.kill()
    try:
        assert (
            run_in_namespace(namespace, partial(through_proxy, where, "allowed.test:443"))[1]
            == GREETING
        )
        kill_squid(number)
        with pytest.raises(ConnectionRefusedError):
            run_in_namespace(namespace, partial(through_proxy, where, "allowed.test:443"))
    finally:
        live.start()
    assert says(live, name, ASK) == GREETING
    kill_squid(number)
    wait_until(lambda: says(live, name, ASK) == GREETING, SOON)


def namespace_of(number: Instance, name: str) -> Path:
    """The network namespace of a sandbox, for when no agent is there to run anything in it."""
    directory = RunDir.of(number)
    records = [json.loads(path.read_bytes()) for path in directory.slots.glob("*.json")]
    (index,) = (record["index"] for record in records if record["owner"].endswith(name))
    return directory.netns / number.slot_name(index)


def test_a_lost_firewall_is_back_before_the_next_start(
    live: Agent, box: Callable[[str], str]
) -> None:
    table = instance(live).nft_table
    for mode in ("restricted", "open"):
        run(["nft", "delete", "table", "inet", table], timeout=10)
        box(mode)
        assert count_table_parts(table)


def test_a_lost_firewall_is_back_soon_without_a_start(
    live: Agent, box: Callable[[str], str]
) -> None:
    table, name = instance(live).nft_table, box("open")
    assert says(live, name, DIRECT) == GREETING
    run(["nft", "delete", "table", "inet", table], timeout=10)
    wait_until(lambda: count_table_parts(table) is not None, SOON)
    assert says(live, name, DIRECT) == GREETING
