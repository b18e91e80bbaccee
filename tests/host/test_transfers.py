"""Files sent into and out of a real container as streams: whole or not at all, at a fixed cost."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.container.transfers import MAX_TRANSFERS
from hostruntime.errors import (
    FileConflict,
    NoSpace,
    NotFound,
    RangeNotSatisfiable,
    TooManyTransfers,
)
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import FilePart, WantedPart
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = [pytest.mark.host, pytest.mark.pythons]

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 1024
ALL = WantedPart()


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[AsyncHostClient]:
    async with AsyncHostClient(agent.client.socket) as one:
        yield one


class Content:
    """Pieces to upload, and how many were taken; ``before`` is awaited before each."""

    def __init__(self, pieces: int, before: Callable[[int], object] | None = None) -> None:
        self.pieces, self.taken, self._before = pieces, 0, before

    @property
    def size(self) -> int:
        return self.pieces * len(PIECE)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in range(self.pieces):
            if self._before is not None:
                self._before(number)
            yield PIECE
            self.taken += 1
            await asyncio.sleep(0)


async def read(
    client: AsyncHostClient, sandbox: SandboxInfo, path: str, wanted: WantedPart = ALL
) -> tuple[FilePart, bytes]:
    async with client.read_part(sandbox.id, path, wanted) as (part, pieces):
        return part, b"".join([bytes(piece) async for piece in pieces])


def run(host: HostClient, sandbox: SandboxInfo, command: str) -> str:
    return host.exec(sandbox.id, Exec(command)).stdout.decode()


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_what_is_sent_in_comes_out_again(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    content, path = Content(80), "/workspace/new/big"
    assert await client.write_stream(sandbox.id, path, content.size, aiter(content)) == content.size
    part, data = await read(client, sandbox, path)
    assert (part.first, part.length, part.stat.size) == (0, content.size, content.size)
    assert data == PIECE * 80
    assert run(host, sandbox, f"stat -c '%a %U:%G' {path}") == "644 root:root\n"


async def test_an_empty_file_goes_both_ways(client: AsyncHostClient, sandbox: SandboxInfo) -> None:
    assert await client.write_stream(sandbox.id, "/tmp/none", 0, aiter(Content(0))) == 0
    part, data = await read(client, sandbox, "/tmp/none")
    assert (part.length, data) == (0, b"")


@pytest.mark.parametrize("size", [1000, 400_000])
@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 0, slice(0, 1)),
        (10, 19, slice(10, 20)),
        (990, None, slice(990, None)),
        (990, 10_000_000, slice(990, None)),
        (None, 7, slice(-7, None)),
        (None, 10_000_000, slice(0, None)),
    ],
)
async def test_a_part_is_just_those_bytes(
    client: AsyncHostClient,
    host: HostClient,
    sandbox: SandboxInfo,
    size: int,
    first: int | None,
    last: int | None,
    expected: slice,
) -> None:
    whole = (PIECE * 2)[:size]
    host.write_file(sandbox.id, "/workspace/f", whole)
    part, data = await read(client, sandbox, "/workspace/f", WantedPart(first, last))
    assert data == whole[expected]
    assert (part.first, part.length) == (len(whole) - len(whole[part.first :]), len(data))
    assert part.stat.size == size


@pytest.mark.parametrize("wanted", [WantedPart(3), WantedPart(3, 9), WantedPart(None, 0)])
async def test_a_part_outside_of_a_file_is_refused_with_its_size(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo, wanted: WantedPart
) -> None:
    host.write_file(sandbox.id, "/workspace/f", b"abc")
    with pytest.raises(RangeNotSatisfiable) as refused:
        await read(client, sandbox, "/workspace/f", wanted)
    assert refused.value.size == 3


async def test_a_file_that_does_not_know_its_size_is_whole(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    part, data = await read(client, sandbox, "/proc/version")
    assert data.decode() == run(host, sandbox, "cat /proc/version")
    assert part.length == len(data) > 0


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/workspace/absent", NotFound),
        ("/workspace", FileConflict),
        ("/dev/zero", FileConflict),
        ("/workspace/pipe", FileConflict),
        ("/workspace/nowhere", NotFound),
    ],
)
async def test_only_files_come_out(
    client: AsyncHostClient,
    host: HostClient,
    sandbox: SandboxInfo,
    path: str,
    error: type[Exception],
) -> None:
    run(host, sandbox, "mkfifo pipe; ln -s absent nowhere")
    with pytest.raises(error):
        await read(client, sandbox, path)


async def test_links_lead_where_they_do_inside(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    run(host, sandbox, "ln -s /etc/hostname out; ln -s ../../../../../../tmp in")
    assert (await read(client, sandbox, "/workspace/out"))[1] == run(
        host, sandbox, "cat /etc/hostname"
    ).encode()
    await client.write_stream(sandbox.id, "/workspace/in/x", len(PIECE), aiter(Content(1)))
    assert run(host, sandbox, "stat -c %s /tmp/x") == f"{len(PIECE)}\n"


async def test_an_upload_that_breaks_off_leaves_the_old_file_and_nothing_else(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    run(host, sandbox, "echo old > f")
    seen: list[str] = []

    def break_off(number: int) -> None:
        if number == 30:
            seen.append(run(host, sandbox, "ls -A"))
            raise KeyError("the client has gone")

    content = Content(60, break_off)
    with pytest.raises(KeyError):
        await client.write_stream(sandbox.id, "/workspace/f", content.size, aiter(content))
    assert seen == ["f\n"], "the new file had a name before it was whole"
    assert run(host, sandbox, "cat f; ls -A") == "old\nf\n"
    await eventually(lambda: inside(host, sandbox) == 0)


async def test_an_upload_whose_process_is_killed_leaves_nothing(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    def kill(number: int) -> None:
        if number == 10:
            # Everything that is not the shell that does it.
            run(host, sandbox, "kill -9 -1")

    content = Content(400, kill)
    with pytest.raises(Exception, match="killed inside the sandbox"):
        await client.write_stream(sandbox.id, "/workspace/f", content.size, aiter(content))
    assert content.taken < content.pieces
    assert run(host, sandbox, "ls -A /workspace") == ""


async def test_what_cannot_fit_is_refused_before_it_is_sent(
    client: AsyncHostClient, new_sandbox: NewSandbox, host: HostClient
) -> None:
    sandbox = new_sandbox(memory_mb=64)
    host.write_file(sandbox.id, "/tmp/f", b"old")
    content = Content(400)
    with pytest.raises(NoSpace, match="no space"):
        await client.write_stream(sandbox.id, "/tmp/f", content.size, aiter(content))
    assert content.taken < 40
    assert run(host, sandbox, "cat /tmp/f; ls -A /tmp") == "oldf\n"


async def test_a_disk_that_fills_up_meanwhile_leaves_the_old_file(
    client: AsyncHostClient, new_sandbox: NewSandbox, host: HostClient
) -> None:
    sandbox = new_sandbox(memory_mb=64)
    host.write_file(sandbox.id, "/tmp/f", b"old")

    def fill(number: int) -> None:
        if number == 4:
            run(host, sandbox, "cat /dev/zero > /tmp/other")

    content = Content(60, fill)
    with pytest.raises(NoSpace, match="no space"):
        await client.write_stream(sandbox.id, "/tmp/f", content.size, aiter(content))
    assert run(host, sandbox, "cat /tmp/f; ls -A /tmp") == "oldf\nother\n"


async def test_only_so_many_are_under_way_in_one_sandbox(
    client: AsyncHostClient, host: HostClient, new_sandbox: NewSandbox
) -> None:
    full, other = new_sandbox(), new_sandbox()
    for sandbox in (full, other):
        run(host, sandbox, "truncate -s 50M f")
    async with AsyncExitStack() as stack:
        for _ in range(MAX_TRANSFERS):
            await stack.enter_async_context(client.read_part(full.id, "/workspace/f", ALL))
        with pytest.raises(TooManyTransfers):
            await read(client, full, "/workspace/f")
        assert len((await read(client, other, "/workspace/f"))[1]) == 50 * MIB
    await eventually(lambda: inside(host, full) == 0)
    assert len((await read(client, full, "/workspace/f"))[1]) == 50 * MIB


async def test_the_agent_stays_as_it_was_whatever_passes_through(
    agent: Agent, client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    warm = Content(8)
    await client.write_stream(sandbox.id, "/workspace/f", warm.size, aiter(warm))
    await read(client, sandbox, "/workspace/f")
    before = measured(agent.pid)
    content = Content(1200)
    await client.write_stream(sandbox.id, "/workspace/f", content.size, aiter(content))
    async with client.read_part(sandbox.id, "/workspace/f", ALL) as (part, pieces):
        await asyncio.sleep(1)
        # Nobody reads: what is not taken stays where it is.
        assert measured(agent.pid)[0] - before[0] < 12 * MIB
        assert sum([len(piece) async for piece in pieces]) == part.length == content.size
    async with client.read_part(sandbox.id, "/workspace/f", ALL) as (_, pieces):
        await anext(aiter(pieces))
        # And this one gives up.
    assert measured(agent.pid)[0] - before[0] < 12 * MIB
    await eventually(lambda: measured(agent.pid)[1] <= before[1])
    await eventually(lambda: inside(host, sandbox) == 0)


async def test_the_agent_has_no_part_in_what_passes(
    agent: Agent, client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    def stop(number: int) -> None:
        if number == 1:
            os.kill(agent.pid, signal.SIGSTOP)

    content = Content(200, stop)
    try:
        sending = asyncio.ensure_future(
            client.write_stream(sandbox.id, "/workspace/f", content.size, aiter(content))
        )
        await eventually(lambda: content.taken == content.pieces)
        # Only the outcome is the agent's to tell.
        assert not sending.done()
        os.kill(agent.pid, signal.SIGCONT)
        assert await sending == content.size
        async with client.read_part(sandbox.id, "/workspace/f", ALL) as (_, pieces):
            os.kill(agent.pid, signal.SIGSTOP)
            assert sum([len(piece) async for piece in pieces]) == content.size
    finally:
        os.kill(agent.pid, signal.SIGCONT)
    await eventually(lambda: inside(host, sandbox) == 0)


async def test_a_file_that_is_cut_meanwhile_ends_early(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    run(host, sandbox, "truncate -s 50M f")
    async with client.read_part(sandbox.id, "/workspace/f", ALL) as (part, pieces):
        first = await anext(aiter(pieces))
        run(host, sandbox, "truncate -s 0 f")
        rest = sum([len(piece) async for piece in pieces])
    assert len(first) + rest < part.length == 50 * MIB


async def test_a_refusal_does_not_wait_for_the_rest(
    client: AsyncHostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(memory_mb=64)
    never = asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield PIECE
        await never.wait()

    async with asyncio.timeout(30):
        with pytest.raises(NoSpace):
            await client.write_stream(sandbox.id, "/tmp/f", 400 * MIB, stalling())


async def test_a_sandbox_that_takes_nothing_is_sent_nothing(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    def stop(number: int) -> None:
        if number == 10:
            run(host, sandbox, "kill -STOP -1")

    content = Content(200, stop)
    sending = asyncio.ensure_future(
        client.write_stream(sandbox.id, "/workspace/f", content.size, aiter(content))
    )
    await eventually(lambda: content.taken >= 10)
    taken = -1
    while taken < content.taken:
        taken = content.taken
        await asyncio.sleep(1)
    # What fits into the buffers on the way.
    assert taken < 40
    run(host, sandbox, "kill -CONT -1")
    assert await sending == content.size


def measured(pid: int) -> tuple[int, int]:
    """A process's resident memory in bytes, and its descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(resident) * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def inside(host: HostClient, sandbox: SandboxInfo) -> int:
    """How many processes are in the container that no command and no init is."""
    listed = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null"
    return run(host, sandbox, listed).count("hostruntime.container.lxc")
