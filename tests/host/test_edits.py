"""Text replaced in files, and lines read from them, in a real container."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.errors import (
    FileConflict,
    FileTooLarge,
    NoSpace,
    NotFound,
    RangeNotSatisfiable,
    TextNotFound,
)
from hostruntime.wire.commands import Exec
from hostruntime.wire.files import EditFile, WantedPart
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent
from tests.host.client import HostClient

pytestmark = [pytest.mark.host, pytest.mark.pythons]


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[AsyncHostClient]:
    async with AsyncHostClient(agent.client.socket) as one:
        yield one


def run(host: HostClient, sandbox: SandboxInfo, command: str) -> str:
    return host.exec(sandbox.id, Exec(command)).stdout.decode("latin-1")


def test_an_edit_is_whole_or_not_at_all(host: HostClient, sandbox: SandboxInfo) -> None:
    def edit(path: str, old: str = "old", new: str = "new", count: int | None = 1) -> int:
        return host.edit_file(sandbox.id, EditFile(f"/workspace/{path}", old, new, count)).count

    run(host, sandbox, r"printf 'a\nold\r\n\377\0' > f; chown 12:34 f; chmod 4751 f; ln -s f link")
    done = host.edit_file(sandbox.id, EditFile("/workspace/link", "old", "größer"))
    assert (done.count, done.line, done.size) == (1, 2, 14)
    # As for write_file: the link stays, and what it leads to is replaced.
    found = run(host, sandbox, "readlink link; stat -c '%a %u:%g' f; ls -A; od -c f | head -1")
    assert found.splitlines()[:4] == ["f", "4751 12:34", "f", "link"]
    assert "377  \\0" in found
    with pytest.raises(TextNotFound, match="CR LF"):
        edit("f", "r\n", "x")
    run(host, sandbox, "echo old old > f; mkfifo p; mkdir d; ln -s /proc/self/status own")
    for count, error in ((1, TextNotFound), (3, TextNotFound)):
        with pytest.raises(error):
            edit("f", count=count)
    assert edit("f", count=None) == 2
    for path in ("p", "d"):
        with pytest.raises(FileConflict):
            edit(path)
    for path in ("none", "own"):
        with pytest.raises(NotFound):
            edit(path)
    # Nothing grows beyond the limit, and a full disk leaves the file as it was.
    run(
        host,
        sandbox,
        "head -c 16777216 /dev/zero | tr '\\0' x > big; cp big bigger; echo >> bigger",
    )
    for path in ("big", "bigger"):
        with pytest.raises(FileTooLarge):
            edit(path, "x", "xy", None)
    assert edit("big", "x", "y", None) == 16 * 1024 * 1024
    run(host, sandbox, "seq 99999 > /tmp/f; cat /dev/zero > /tmp/full 2>/dev/null")
    with pytest.raises(NoSpace):
        host.edit_file(sandbox.id, EditFile("/tmp/f", "9999\n", "x\n", None))
    assert run(host, sandbox, "ls -A /tmp; tail -1 /tmp/f") == "f\nfull\n99999\n"
    assert run(host, sandbox, "ls -A | grep ork-") == ""


async def test_lines_come_from_files_of_any_size(
    client: AsyncHostClient, host: HostClient, sandbox: SandboxInfo
) -> None:
    async def lines(path: str, line: int, count: int | None = None, most: int = 1000) -> str:
        wanted = WantedPart(line=line, lines=count, most=most)
        async with client.read_part(sandbox.id, path, wanted) as (part, pieces):
            data = b"".join([bytes(piece) async for piece in pieces])
            assert len(data) == part.length
            return data.decode()

    run(host, sandbox, "seq 1000000 > seq; printf 'no end' > short")
    seq = "/workspace/seq"
    assert await lines(seq, 1, 2) == "1\n2\n"
    assert await lines(seq, 777_777, 1) == "777777\n"
    assert await lines(seq, -2) == "999999\n1000000\n"
    assert await lines(seq, -500_000, 1) == "500001\n"
    assert await lines(seq, 500_000, None, most=9) == "500000\n50"
    assert await lines("/workspace/short", -1) == "no end"
    assert (await lines("/proc/meminfo", 1, 1)).startswith("MemTotal:")
    with pytest.raises(RangeNotSatisfiable, match="has only 1,000,000 lines"):
        await lines(seq, 1_000_002)
    wanted = WantedPart(last=10**12, most=5)
    async with client.read_part(sandbox.id, seq, wanted) as (part, pieces):
        assert (part.first, b"".join([bytes(piece) async for piece in pieces])) == (0, b"1\n2\n3")
