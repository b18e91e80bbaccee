"""What the front says itself, and what it carries where."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

import pytest

from orkestr_console.core.errors import HostUnavailable, PlanLimit
from orkestr_console.previews import visits
from orkestr_console.previews.front import Limits
from sandboxes_app import services
from sandboxes_app.services import Unreached
from tests.previews.conftest import HOST, ULID, Echo, World, a_sandbox, request, says


def status_and_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    code = json.loads(body)["code"]
    assert f"x-orkestr-preview: {code}".encode() in head
    return int(head.split()[1]), code


async def test_a_request_and_its_response_pass(world: World) -> None:
    world.program = echo = Echo()
    answer = await world.ask(request("Accept: a/b", line="GET /a?b=c HTTP/1.1"))
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"\r\n\r\nok")
    assert world.ports == [3000]
    assert echo.heads[0].startswith("GET /a?b=c HTTP/1.1\r\n")
    assert f"\r\nhost: {HOST}\r\n" in echo.heads[0]


@pytest.mark.parametrize(
    "host",
    [
        f"3000-{ULID}.localhost",
        f"3000-{ULID}.localhost:8002",
        f"3000-{ULID}.localhost:8001.",
        f"3000-{ULID}.other.localhost:8001",
        f"x.3000-{ULID}.localhost:8001",
        f"03000-{ULID}.localhost:8001",
        f"0-{ULID}.localhost:8001",
        f"65536-{ULID}.localhost:8001",
        f"{ULID}.localhost:8001",
        f"3000-{ULID[:-1]}.localhost:8001",
        f"3000-{ULID[:-1]}u.localhost:8001",
        f"3000-{'z' * 26}.localhost:8001",
        f"٣-{ULID}.localhost:8001",
        "localhost:8001",
        "127.0.0.1:8001",
        "",
    ],
)
async def test_a_host_that_is_none_of_ours_leads_nowhere(world: World, host: str) -> None:
    world.program = Echo()
    answer = await world.ask(request(host=host))
    assert int(answer.split()[1]) in {400, 404}
    assert world.ports == []


async def test_no_tunnel_is_made(world: World) -> None:
    world.program = says(b"HTTP/1.1 200 OK\r\n\r\nanything")
    answer = await world.ask(request(line="CONNECT /a HTTP/1.1"))
    assert status_and_code(answer) == (400, "malformed_request")
    assert world.ports == []


async def test_the_case_of_a_host_means_nothing(world: World) -> None:
    world.program = Echo()
    assert b" 200 " in await world.ask(request(host=HOST.upper()))


async def test_health_is_asked_under_any_other_name(world: World) -> None:
    assert b" 200 " in await world.ask(request(line="GET /healthz HTTP/1.1", host="127.0.0.1"))
    answer = await world.ask(request(line="GET /healthz HTTP/1.1"))
    assert status_and_code(answer) == (502, "nothing_listens")


async def test_a_sandbox_that_is_not_there(world: World) -> None:
    world.sandbox = None
    assert status_and_code(await world.ask(request())) == (404, "no_such_preview")
    world.sandbox, world.program = a_sandbox(), Unreached.GONE
    assert status_and_code(await world.ask(request())) == (404, "no_such_preview")


async def test_people_get_a_page_that_reads_nothing_and_is_kept_nowhere(world: World) -> None:
    answer = await world.ask(request("Accept: text/html,*/*"))
    assert b"<h1>Nothing listens on port 3000</h1>" in answer
    for header in (b"cache-control: no-store", b"default-src 'none'", b"frame-ancestors 'none'"):
        assert header in answer


async def test_a_paused_sandbox_says_so_and_wakes_only_if_it_was_made_to(world: World) -> None:
    world.program = Echo()
    world.sandbox = a_sandbox()
    world.sandbox.status = "paused"
    assert status_and_code(await world.ask(request())) == (503, "sandbox_paused")
    assert world.woken == 0
    world.sandbox.auto_resume = True
    assert b" 200 " in await world.ask(request())
    assert world.woken == 1


async def test_one_that_is_paused_after_its_row_was_read_wakes_as_well(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visits, "AHEAD_SECONDS", 0)
    world.sandbox, world.program = a_sandbox(auto_resume=True), Unreached.PAUSED

    async def wake(_: object) -> None:
        world.program = Echo()

    monkeypatch.setattr(services, "wake_for_visitor", wake)
    assert b" 200 " in await world.ask(request())


async def test_one_that_cannot_wake_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def wake(_: object) -> None:
        raise PlanLimit("All are in use; terminate one.")

    monkeypatch.setattr(services, "wake_for_visitor", wake)
    world.sandbox = a_sandbox(auto_resume=True)
    world.sandbox.status = "paused"
    answer = await world.ask(request())
    assert status_and_code(answer) == (503, "cannot_resume")
    assert b"terminate one" in answer


async def test_no_visitor_wakes_a_sandbox_without_its_token(world: World) -> None:
    world.sandbox = a_sandbox(auto_resume=True, preview_auth=True)
    world.sandbox.status = "paused"
    assert status_and_code(await world.ask(request())) == (401, "preview_token_needed")
    assert world.woken == 0


async def test_an_agent_that_is_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(*_: object) -> None:
        raise HostUnavailable

    monkeypatch.setattr(services, "connect_to_port", connect)
    assert status_and_code(await world.ask(request())) == (503, "host_unavailable")


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nA B: c\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n"],
)
async def test_a_program_that_speaks_no_http(world: World, answer: bytes) -> None:
    world.program = says(answer)
    assert status_and_code(await world.ask(request())) == (502, "bad_response")


async def test_a_response_that_breaks_off_is_never_whole(world: World) -> None:
    world.program = says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    reader, _ = await world.visit(request())
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await reader.readexactly(10_000)
    world.program = says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
    reader, _ = await world.visit(request())
    got = b""
    with suppress(ConnectionResetError):
        got = await reader.read()
    assert not got.endswith(b"0\r\n\r\n")


async def test_a_response_without_a_length_gets_its_end(world: World) -> None:
    world.program = says(b"HTTP/1.0 200 OK\r\n\r\nall of it")
    answer = await world.ask(request())
    assert b"transfer-encoding: chunked" in answer.lower()
    assert answer.endswith(b"9\r\nall of it\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: %b\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        b"POST / HTTP/1.0\r\nHost: %b\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: %b\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET http://%b/ HTTP/1.1\r\nHost: %b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: %b\r\nHost: %b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : %b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: %b\r\nA: b\rc\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: %b\r\nA: b\x00\r\n\r\n",
        b"CONNECT %b HTTP/1.1\r\nHost: %b\r\n\r\n",
    ],
)
async def test_what_two_could_read_differently_is_not_passed_on(world: World, sent: bytes) -> None:
    world.program = Echo()
    answer = await world.ask(sent.replace(b"%b", HOST.encode()))
    assert int(answer.split()[1]) in {400, 501}
    assert world.ports == []


async def test_a_head_that_is_too_large_is_refused(world: World) -> None:
    world.program = Echo()
    answer = await world.ask(request(f"A: {'a' * 40_000}"))
    assert b" 431 " in answer
    reader, writer = await world.visit(b"GET / HTTP/1.1\r\n")
    writer.write(b"A: " + b"a" * 200_000)
    assert b" 431 " in await reader.readuntil(b"\r\n\r\n")


async def test_a_connection_serves_one_request_after_the_other(world: World) -> None:
    world.program = echo = Echo()
    reader, writer = await world.visit()
    for number in range(3):
        writer.write(f"GET /{number} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\nok")).startswith(b"HTTP/1.1 200")
    assert [head.split()[1] for head in echo.heads] == ["/0", "/1", "/2"]
    # None is another's, whatever it was.
    assert world.connections == 3


async def test_a_sandbox_has_no_more_requests_than_its_share(world: World) -> None:
    held = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.write(b"HTTP/1.1 204 No\r\n\r\n")
        await writer.drain()

    world.front.limits, world.program = Limits(per_sandbox=2), hold
    first = [await world.visit(request()) for _ in range(2)]
    await until(lambda: world.connections == 2)
    assert status_and_code(await world.ask(request())) == (503, "too_many_connections")
    held.set()
    for reader, _ in first:
        assert b" 204 " in await reader.read()
    world.program = Echo()
    assert b" 200 " in await world.ask(request())
    assert (world.front._requests, world.front._teams) == ({}, {})


async def test_who_has_waited_longest_makes_room_and_health_is_answered(world: World) -> None:
    world.front.limits = Limits(connections=3)
    idle = [await world.visit(b"GET / HT") for _ in range(3)]
    await asyncio.sleep(0)
    answer = await world.ask(request(line="GET /healthz HTTP/1.1", host="127.0.0.1"))
    assert b" 200 " in answer
    async with asyncio.timeout(20):
        with pytest.raises(ConnectionResetError):
            await idle[0][0].read(1)
            raise ConnectionResetError
    assert not idle[2][0].at_eof()


async def until(condition: object) -> None:
    async with asyncio.timeout(20):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def test_a_sandbox_that_has_ended_loses_its_visitors(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
        await asyncio.Event().wait()

    world.program = endless
    reader, _ = await world.visit(request())
    await reader.readuntil(b"data: 1")
    monkeypatch.setattr(services, "ended_among", lambda ids: set(ids))
    await world.front.cut_ended()
    async with asyncio.timeout(20):
        with suppress(ConnectionResetError):
            assert not (await reader.read()).endswith(b"0\r\n\r\n")
    await until(lambda: not world.front._requests)
