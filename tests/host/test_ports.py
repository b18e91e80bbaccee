"""Connections to ports inside sandboxes: to the right one, or to none."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostruntime.client.ports import open_port
from hostruntime.container import ports as container_ports
from hostruntime.container.ports import MAX_WAITING, PortService
from hostruntime.errors import (
    Conflict,
    ContainerGone,
    ContainerPaused,
    HostError,
    InvalidRequest,
    NotFound,
    PortClosed,
)
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually
from tests.host.background import begin
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

# Answers every connection with a word, on one address and port.
SERVER = (
    "perl -MIO::Socket::IP -e '$s=IO::Socket::IP->new(LocalHost=>$ARGV[0],LocalPort=>$ARGV[1],"
    "GetAddrInfoFlags=>0,Listen=>64,ReuseAddr=>1) or die $@;"
    'while($c=$s->accept){{print $c "{word}"; close $c}}'
    "' {address} {port}"
)


def serve(
    host: HostClient, sandbox: SandboxInfo, word: str, port: int, address: str = "127.0.0.1"
) -> None:
    begin(host, sandbox, SERVER.format(word=word, address=address, port=port))
    wanted = f"{port:04X} "
    for _ in eventually():
        listening = host.exec(sandbox.id, Exec("cat /proc/net/tcp /proc/net/tcp6"))
        if any(wanted in line for line in listening.stdout.decode().splitlines()):
            return


async def read(agent: Agent, sandbox: str, port: int) -> bytes:
    """What a program says to whoever connects."""
    with closing(await open_port(agent.socket, sandbox, port)) as opened:
        said, loop = b"", asyncio.get_running_loop()
        while data := await loop.sock_recv(opened, 1024):
            said += data
        return said


async def test_each_sandbox_is_reached_on_either_loopback_and_no_other(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    first, second = new_sandbox(network="restricted"), new_sandbox(network="open")
    serve(host, first, "first", 8080)
    serve(host, first, "sixth", 8081, "::1")
    serve(host, second, "second", 8080)
    assert await read(agent, first.id, 8080) == b"first"
    assert await read(agent, first.id, 8081) == b"sixth"
    assert await read(agent, second.id, 8080) == b"second"
    for port in (8082, 65535):
        with pytest.raises(PortClosed, match=str(port)):
            await read(agent, first.id, port)
    with pytest.raises(PortClosed):
        await read(agent, second.id, 8081)
    # A pause keeps everybody out, and the end all the more.
    host.pause_sandbox(second.id, None)
    with pytest.raises(ContainerPaused):
        await read(agent, second.id, 8080)
    host.resume_sandbox(second.id, None)
    held = await open_port(agent.socket, second.id, 8080)
    host.delete_sandbox(second.id)
    with pytest.raises((ContainerGone, NotFound)):
        await read(agent, second.id, 8080)
    # And a connection of before ends with it.
    with held, suppress(ConnectionResetError):
        async with asyncio.timeout(20):
            while await asyncio.get_running_loop().sock_recv(held, 1024):
                pass
    await nothing_is_left(agent, first)


async def nothing_is_left(agent: Agent, sandbox: SandboxInfo) -> None:
    """Neither descriptors nor threads, however many have connected."""
    for _ in range(8):
        await read(agent, sandbox.id, 8080)
    before = descriptors(agent), threads(agent)
    for _ in range(5):
        await asyncio.gather(*(read(agent, sandbox.id, 8080) for _ in range(10)))
    # The agent has other things to do, which come and go; a leak would be one of each connection.
    for _ in eventually():
        if descriptors(agent) < before[0] + 25 and threads(agent) < before[1] + 25:
            return


def descriptors(agent: Agent) -> int:
    return sum(1 for _ in Path(f"/proc/{agent.pid}/fd").iterdir())


def threads(agent: Agent) -> int:
    return sum(1 for _ in Path(f"/proc/{agent.pid}/task").iterdir())


async def test_a_sandbox_without_a_network_has_no_ports_for_others(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    serve(host, sandbox, "off", 8080)
    with pytest.raises(Conflict, match="no network"):
        await read(agent, sandbox.id, 8080)
    with pytest.raises(NotFound):
        await read(agent, "sbx_nobody", 8080)


async def test_what_is_no_request_is_refused_and_the_next_one_served(agent: Agent) -> None:
    path = f"{agent.socket}.ports"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(20)
        link.connect(path)
        link.send(b"{")
        assert InvalidRequest.code in link.recv(4096).decode()
    assert Path(path).stat().st_mode & 0o777 == Path(agent.socket).stat().st_mode & 0o777


@pytest.fixture
def server() -> Iterator[int]:
    """A port of this machine's own loopback that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


async def test_a_container_that_is_replaced_meanwhile_is_not_connected_to(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address, its slot and its namespace's path are another's by then."""
    old, new = (SimpleNamespace(owner="sbx", name="ork0-x", init_pid=os.getpid()) for _ in range(2))
    current = old
    containers = SimpleNamespace(get=lambda _: current)
    monkeypatch.setattr(container_ports, "pids_under", lambda _: [os.getpid()])
    service = PortService(containers)  # type: ignore[arg-type]
    (await service.connect("sbx", server)).close()
    connect = container_ports._connect_within

    async def replaced(*arguments: object) -> None:
        nonlocal current
        await connect(*arguments)  # type: ignore[arg-type]
        current = new

    monkeypatch.setattr(container_ports, "_connect_within", replaced)
    before = own_descriptors()
    for _ in range(10):
        current = old
        with pytest.raises(ContainerGone):
            await service.connect("sbx", server)
    # A pid that is another's by now is not in the container's groups.
    monkeypatch.setattr(container_ports, "pids_under", lambda _: [])
    for _ in range(10):
        with pytest.raises(ContainerGone):
            await service.connect("sbx", server)
    # What earlier tests left to the garbage collector comes and goes beside it.
    assert own_descriptors() < before + 10


def own_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_port_that_meets_itself_is_closed(server: int) -> None:
    """Of two ends with one port, none is a program's."""
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    with made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
        with pytest.raises((ConnectionRefusedError, HostError)):
            await container_ports._connect_within(made, "127.0.0.1", port)


async def test_who_lets_connections_wait_keeps_nobody_from_another_container(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose queue is full takes seconds each time (listen(2)), as often as it is asked."""
    both = {
        owner: SimpleNamespace(owner=owner, name="ork0-x", init_pid=os.getpid())
        for owner in ("slow", "sbx")
    }
    monkeypatch.setattr(container_ports, "pids_under", lambda _: [os.getpid()])
    service = PortService(SimpleNamespace(get=both.__getitem__))  # type: ignore[arg-type]
    connect, never = container_ports._connect_within, asyncio.Event()

    async def wait_or_connect(made: socket.socket, address: str, port: int) -> None:
        if port == 1:
            await never.wait()
        await connect(made, address, port)

    monkeypatch.setattr(container_ports, "_connect_within", wait_or_connect)
    before = own_descriptors()
    slow = [asyncio.create_task(service.connect("slow", 1)) for _ in range(MAX_WAITING)]
    try:
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            (await service.connect("sbx", server)).close()
            # Nor does it have more of the agent's descriptors than it is worth.
            with pytest.raises(PortClosed, match="Too many"):
                await service.connect("slow", 1)
    finally:
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    assert not service._queues
    # Their errors know the sockets that were made for them.
    slow.clear()
    # A socket made for who has left is closed with its object, and the server closes its own.
    for _ in eventually(20):
        gc.collect()
        if own_descriptors() < before + MAX_WAITING // 2:
            break
        await asyncio.sleep(0.05)
