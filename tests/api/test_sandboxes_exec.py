"""``POST /v1/sandboxes/{id}/exec``, buffered and streamed."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from django.test import AsyncClient, Client

from hostruntime.errors import ContainerGone, CwdNotFound, ExecTimeout, Held, HostUnavailable
from hostruntime.wire.commands import ExecFrame, ExecResult, Quota, RefusedRequest
from orkestr_console.accounts.models import AuditEntry, Team, TeamLimits
from orkestr_console.accounts.services import authenticate_token
from orkestr_console.http import closing
from orkestr_console.http.daphne import ConsoleServer
from orkestr_console.http.handler import Handler
from orkestr_console.http.processes import Place
from orkestr_console.http.threads import in_thread
from sandboxes_app import api as views
from sandboxes_app.models import Sandbox
from sandboxes_app.services import exec_stream
from sandboxes_app.specs import ExecSpec
from tests.api.asking import post, refusal
from tests.fakes.host import FakeHost

REFUSED = (
    RefusedRequest("a.test", 443, "not_listed"),
    RefusedRequest("192.0.2.1", 22, "past_proxy", direct=True),
)


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    answer = post(api, "/v1/sandboxes", {"template": "debian-12", "env": {"A": "1", "B": "2"}})
    return f"/v1/sandboxes/{answer.json()['id']}"


def run(api: Client, box: str, command: str = "make", **fields: Any) -> Any:
    return post(api, f"{box}/exec", {"command": command, **fields})


@pytest.mark.parametrize(
    ("out", "err", "cut"), [(b"a" * 100, b"b", "stdout"), (b"a", b"b" * 100, "stderr")]
)
def test_output_that_is_cut_says_so_in_itself(
    api: Client, host: FakeHost, box: str, out: bytes, err: bytes, cut: str
) -> None:
    host.answers["make"] = ExecResult(0, None, out, err, 41, truncated=True)
    said = run(api, box).json()
    assert said["truncated"] is True
    assert said[cut].endswith(
        "output past 16 MiB was left out here; write it to a file, and read that in parts …]\n"
    )
    assert "left out" not in said["stderr" if cut == "stdout" else "stdout"]


def test_a_command_answers_its_output_and_how_it_ended(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = ExecResult(3, None, "größe\n".encode(), b"bad \xff byte", 41)
    answer = run(api, box)
    assert answer.status_code == 200
    said = answer.json()
    assert said == {
        "stdout": "größe\n",
        "stderr": "bad � byte",
        "exit_code": 3,
        "duration_ms": 41,
        "truncated": False,
    }


def test_what_the_network_policy_refused_stands_beside_the_exit_status(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = ExecResult(7, None, b"half", b"no way", 41, refused=REFUSED)
    said = run(api, box).json()
    assert (said["exit_code"], said["stdout"]) == (7, "half")
    assert (said["error_code"], said["refused_hosts"]) == ("network_policy_blocked", ["a.test"])
    for part in ("While this command ran", "a.test:443, 192.0.2.1:22 (past the proxy)"):
        assert part in said["error_message"]
    assert "allow_domains" in said["error_message"]
    # The official clients show nothing else.
    assert said["stderr"] == f"no way\n[network_policy_blocked: {said['error_message']}]\n"


def test_an_error_that_ended_a_command_tells_of_the_network_policy_as_well(
    api: Client, host: FakeHost, box: str
) -> None:
    late = ExecTimeout("It ran past 1 second.")
    late.extra |= {"stdout": b"half", "stderr": b"", "refused": REFUSED}
    killed = ExecResult(139, 11, b"before", b"", 5, refused=REFUSED)
    for outcome, status, code in ((late, 408, "exec_timeout"), (killed, 409, "exec_killed")):
        host.answers["make"] = outcome
        said = refusal(run(api, box), status, code)
        assert said["refused_hosts"] == ["a.test"]
        assert "the network policy refused its sandbox a.test:443" in said["detail"]


def test_it_runs_in_the_workspace_with_the_sandboxes_variables(
    api: Client, host: FakeHost, box: str
) -> None:
    run(api, box, env={"B": "3"})
    [ran] = host.ran
    assert (ran.command, ran.cwd, ran.timeout_seconds) == ("make", "/workspace", 60)
    assert ran.env == {"A": "1", "B": "3"}


def test_what_the_official_sdk_sends_is_taken(api: Client, host: FakeHost, box: str) -> None:
    fields: dict[str, Any] = {"cwd": "/tmp", "env": {}, "timeout_seconds": 3600, "stream": False}
    assert run(api, box, **fields).status_code == 200
    assert (host.ran[0].cwd, host.ran[0].timeout_seconds) == ("/tmp", 3600)


def test_a_command_over_its_time_says_so_with_what_it_printed(
    api: Client, host: FakeHost, box: str
) -> None:
    error = ExecTimeout("It ran past 1 second.")
    error.extra |= {"stdout": b"half", "stderr": b"", "duration_ms": 1000}
    host.answers["make"] = error
    said = refusal(run(api, box, timeout_seconds=1), 408, "exec_timeout")
    assert (said["stdout"], said["stderr"]) == ("half", "")


def test_a_command_that_a_signal_ended_names_it(api: Client, host: FakeHost, box: str) -> None:
    host.answers["make"] = ExecResult(139, 11, b"before", b"", 5)
    said = refusal(run(api, box), 409, "exec_killed")
    assert (said["signal"], said["stdout"], said["exit_code"]) == (11, "before", 139)
    assert "SIGSEGV" in said["detail"]


def test_running_out_of_memory_is_said_in_plain_words(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = ExecResult(137, 9, b"", b"", 5, out_of_memory=True)
    assert "memory" in refusal(run(api, box), 409, "exec_killed")["detail"]


def test_a_directory_that_is_not_there_is_said_to_be_missing(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = CwdNotFound("There is no directory /nowhere in the sandbox.")
    assert "/nowhere" in refusal(run(api, box, cwd="/nowhere"), 400, "cwd_not_found")["detail"]


def test_one_that_stands_still_for_want_of_room_says_so_and_is_there_yet(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = Held("The machine is low on disk space.")
    answer = run(api, box)
    assert "low on disk space" in refusal(answer, 503, "host_unavailable")["detail"]
    assert answer.headers["Retry-After"]
    assert Sandbox.objects.get().status == "running"


def test_a_container_that_goes_away_under_a_command_settles_the_row(
    api: Client, host: FakeHost, box: str
) -> None:
    host.answers["make"] = ContainerGone("It ended.")
    host.end(box.rpartition("/")[2], "exited")
    refusal(run(api, box), 409, "sandbox_not_running")
    assert Sandbox.objects.get().status == "failed"


def test_a_host_that_is_away_leaves_the_sandbox_as_it_is(
    api: Client, host: FakeHost, box: str
) -> None:
    host.down = True
    answer = run(api, box)
    refusal(answer, 503, "host_unavailable")
    assert answer.headers["Retry-After"]
    assert Sandbox.objects.get().status == "running"


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "command", "required"),
        ({"command": None}, "command", "must be a string"),
        ({"command": ["ls"]}, "command", "must be a string"),
        ({"command": ""}, "command", "blank"),
        ({"command": " \n "}, "command", "blank"),
        ({"command": "a\0b"}, "command", "NUL"),
        ({"command": "x" * 262_145}, "command", "262,144"),
        ({"command": "true", "cwd": ""}, "cwd", "absolute"),
        ({"command": "true", "cwd": "src"}, "cwd", "absolute"),
        ({"command": "true", "cwd": "/" + "x" * 5000}, "cwd", "4,096"),
        ({"command": "true", "env": {"A": None}}, "env.A", "must be a string"),
        ({"command": "true", "env": {"A B": "x"}}, "env", "variable"),
        ({"command": "true", "timeout_seconds": 0}, "timeout_seconds", "at least 1"),
        ({"command": "true", "timeout_seconds": 3601}, "timeout_seconds", "at most 3600"),
        ({"command": "true", "timeout_seconds": "5"}, "timeout_seconds", "whole number"),
        ({"command": "true", "stream": "yes"}, "stream", "true or false"),
        ({"command": "true", "background": True}, "background", "not a known field"),
    ],
)
def test_bad_input_names_the_field_and_runs_nothing(
    api: Client, host: FakeHost, box: str, body: dict[str, Any], field: str, says: str
) -> None:
    said = refusal(post(api, f"{box}/exec", body), 400, "invalid_request")
    assert said["detail"].startswith(f"{field}: "), said
    assert says in said["detail"], said
    assert host.ran == []


def test_a_token_that_may_only_read_runs_nothing(
    read_only_api: Client, host: FakeHost, box: str
) -> None:
    for stream in (False, True):
        refusal(run(read_only_api, box, stream=stream), 403, "insufficient_scope")
    assert host.ran == []


# Streamed -------------------------------------------------------------------------------------

STARTED = ExecFrame("started", pid=17)
EXITED = ExecFrame("exited", code=0, duration_ms=18)


class AsyncApi:
    """The REST API through ASGI, as the server runs it."""

    def __init__(self, key: str) -> None:
        self._client = AsyncClient()
        # The client's own default headers reach WSGI alone.
        self._headers = {"Authorization": f"Bearer {key}"}

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        return await self._client.post(
            path, body, content_type="application/json", headers=self._headers
        )

    async def stream(self, box: str) -> Any:
        """Ask for the stream of a command."""
        return await self.post(f"/v1/sandboxes/{box}/exec", {"command": "make", "stream": True})


@pytest.fixture
async def stream_api(plans: None, key: str) -> AsyncIterator[AsyncApi]:
    yield AsyncApi(key)
    # The views ran in asgiref's own thread, whose connection nobody else would close.
    await sync_to_async(connections.close_all)()


async def opened(stream_api: AsyncApi, host: FakeHost, *frames: Any) -> Any:
    """Boot a sandbox and ask for a stream of ``frames``."""
    host.frames["make"] = list(frames)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    assert created.status_code == 201, created.content
    return await stream_api.stream(created.json()["id"])


async def events(answer: Any) -> list[dict[str, Any]]:
    """Every event of a stream; comments are left out, as clients leave them out."""
    text = b"".join([part async for part in answer.streaming_content]).decode()
    assert text.endswith("\n\n")
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def chunk(stream: str, data: bytes) -> ExecFrame:
    return ExecFrame("chunk", stream=stream, data=data)


async def test_a_stream_has_the_frames_of_the_wire_contract(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    answer = await opened(
        stream_api, host, STARTED, chunk("stdout", b"4"), chunk("stderr", b"..."), EXITED
    )
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["X-Request-Id"]
    assert await events(answer) == [
        {"kind": "exec_started", "pid": 17},
        {"kind": "exec_chunk", "stream": "stdout", "data": "NA=="},
        {"kind": "exec_chunk", "stream": "stderr", "data": "Li4u"},
        {"kind": "exec_exited", "code": 0, "duration_ms": 18},
    ]
    assert host.ended_early == []


async def test_a_stream_ends_with_what_the_network_policy_refused(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    ended = ExecFrame("exited", code=7, duration_ms=3, refused=REFUSED)
    *_, notice, last = await events(await opened(stream_api, host, STARTED, ended))
    assert (last["kind"], last["code"]) == ("exec_exited", 7)
    assert (last["error_code"], last["refused_hosts"]) == ("network_policy_blocked", ["a.test"])
    assert (notice["kind"], notice["stream"]) == ("exec_chunk", "stderr")
    assert last["error_message"] in base64.b64decode(notice["data"]).decode()
    late = ExecFrame("error", error_code="exec_timeout", message="Late.", refused=REFUSED)
    last = (await events(await opened(stream_api, host, STARTED, late)))[-1]
    assert (last["code"], last["refused_hosts"]) == ("exec_timeout", ["a.test"])
    assert last["message"].startswith("Late. While this command ran")


async def test_characters_are_not_cut_between_chunks(stream_api: AsyncApi, host: FakeHost) -> None:
    data = "größe 🧪".encode()
    pieces = [chunk("stdout", bytes([byte])) for byte in data]
    answer = await opened(stream_api, host, STARTED, *pieces, chunk("stdout", b"\xf0\x9f"), EXITED)
    parts = [base64.b64decode(e["data"]) for e in await events(answer) if e["kind"] == "exec_chunk"]
    assert b"".join(parts) == data + b"\xf0\x9f"
    assert "".join(part.decode() for part in parts[:-1]) == "größe 🧪"


async def test_a_timeout_and_a_signal_end_the_stream_with_an_error_frame(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    over = ExecFrame("error", error_code="exec_timeout", message="Over.", duration_ms=1000)
    answer = await opened(stream_api, host, STARTED, over)
    assert (await events(answer))[-1] == {
        "kind": "error",
        "code": "exec_timeout",
        "message": "Over.",
    }
    killed = ExecFrame("exited", code=137, signal=9, duration_ms=5)
    last = (await events(await opened(stream_api, host, STARTED, killed)))[-1]
    assert (last["kind"], last["code"], last["signal"]) == ("error", "exec_killed", 9)


async def test_an_error_before_the_first_frame_is_an_ordinary_answer(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    answer = await opened(stream_api, host, CwdNotFound("There is no /nowhere."))
    refusal(answer, 400, "cwd_not_found")
    missing = ExecFrame("error", error_code="cwd_not_found", message="There is no /nowhere.")
    refusal(await opened(stream_api, host, missing), 400, "cwd_not_found")
    refusal(await opened(stream_api, host, HostUnavailable("Away.")), 503, "host_unavailable")


async def test_a_host_that_goes_away_under_a_stream_ends_it_with_an_error_frame(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    answer = await opened(stream_api, host, STARTED, HostUnavailable("Away."))
    assert [(e["kind"], e.get("code")) for e in await events(answer)] == [
        ("exec_started", None),
        ("error", "host_unavailable"),
    ]


def exec_scope(box: str, key: str, body: bytes) -> Any:
    """The ASGI scope of a call that runs a command."""
    return {
        "type": "http",
        "method": "POST",
        "path": f"/v1/sandboxes/{box}/exec",
        "query_string": b"",
        "headers": [
            (b"host", b"localhost"),
            (b"authorization", f"Bearer {key}".encode()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ],
    }


async def test_a_reader_that_leaves_ends_the_command(
    stream_api: AsyncApi, host: FakeHost, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    ended = asyncio.Event()

    async def endless(*args: object, **kwargs: object) -> AsyncIterator[ExecFrame]:
        try:
            yield STARTED
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(host, "exec_frames", endless)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    body = b'{"command": "make", "stream": true}'
    box = created.json()["id"]
    scope = exec_scope(box, key, body)
    to_server: asyncio.Queue[Any] = asyncio.Queue()
    from_server: asyncio.Queue[Any] = asyncio.Queue()
    server = asyncio.create_task(Handler()(scope, to_server.get, from_server.put))
    async with asyncio.timeout(10):
        await to_server.put({"type": "http.request", "body": body})
        assert (await from_server.get())["status"] == 200
        assert b"exec_started" in (await from_server.get())["body"]
        assert not ended.is_set()
        await to_server.put({"type": "http.disconnect"})
        await ended.wait()
        await asyncio.gather(server, return_exceptions=True)
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box).order_by("id")
    assert [entry.data async for entry in entries] == [
        {"stream": True},
        {"ended": "the client went away"},
    ]


@pytest.fixture
def hanging(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Every command runs on for long; set once one runs."""
    begun = asyncio.Event()

    async def endless(*args: object, **kwargs: object) -> AsyncIterator[ExecFrame]:
        yield STARTED
        begun.set()
        await asyncio.sleep(60)

    async def waited_for(*args: object, **kwargs: object) -> ExecResult:
        begun.set()
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(host, "exec_frames", endless)
    monkeypatch.setattr(host, "exec_to_completion", waited_for)
    return begun


@pytest.mark.parametrize("stream", [True, False])
async def test_a_command_that_the_servers_end_cuts_off_says_so(
    stream_api: AsyncApi,
    hanging: asyncio.Event,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    stream: bool,
) -> None:
    monkeypatch.setattr(closing, "_stopping", False)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    box = created.json()["id"]
    body = json.dumps({"command": "make", "stream": stream}).encode()
    to_server: asyncio.Queue[Any] = asyncio.Queue()
    from_server: asyncio.Queue[Any] = asyncio.Queue()
    answer = Handler()(exec_scope(box, key, body), to_server.get, from_server.put)
    task = asyncio.create_task(answer)
    server = ConsoleServer(Handler(), Place.alone([]))
    # As when it serves this one request.
    server.connections = {"one": {"application_instance": task}}
    async with asyncio.timeout(20):
        await to_server.put({"type": "http.request", "body": body})
        await hanging.wait()
        server.kill_all_applications()
        await asyncio.gather(task, return_exceptions=True)
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box).order_by("id")
    last = [entry.data async for entry in entries][-1]
    assert last == {"ended": "the server was stopped"}


async def test_a_reader_that_has_the_last_frame_left_nothing_undone(
    stream_api: AsyncApi, host: FakeHost, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The official client closes the connection at once, before the stream has ended."""

    async def ended(*args: object, **kwargs: object) -> AsyncIterator[ExecFrame]:
        yield STARTED
        yield EXITED
        await asyncio.sleep(60)

    monkeypatch.setattr(host, "exec_frames", ended)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    box = created.json()["id"]
    actor = await sync_to_async(authenticate_token)(key, "rest", "192.0.2.1")
    frames = await sync_to_async(exec_stream)(actor, box, ExecSpec(command="make"))
    async with aclosing(frames):
        assert [(await anext(frames))["kind"] for _ in "12"] == ["exec_started", "exec_exited"]
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box)
    assert [entry.data async for entry in entries] == [{"stream": True}]


async def test_a_client_that_waits_and_goes_away_ends_the_command(
    stream_api: AsyncApi, host: FakeHost, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(*args: object, **kwargs: object) -> ExecResult:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        raise AssertionError

    monkeypatch.setattr(host, "exec_to_completion", endless)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    box = created.json()["id"]
    to_server: asyncio.Queue[Any] = asyncio.Queue()
    body = b'{"command": "make secrets"}'
    scope = exec_scope(box, key, body)
    from_server: asyncio.Queue[Any] = asyncio.Queue()
    server = asyncio.create_task(Handler()(scope, to_server.get, from_server.put))
    async with asyncio.timeout(20):
        await to_server.put({"type": "http.request", "body": body})
        await begun.wait()
        await to_server.put({"type": "http.disconnect"})
        await ended.wait()
        await asyncio.gather(server, return_exceptions=True)
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box)
    assert [entry.data async for entry in entries] == [{"ended": "the client went away"}]


async def test_a_client_that_leaves_while_the_end_is_recorded_loses_no_entry(
    stream_api: AsyncApi, host: FakeHost, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    waits, has_one = asyncio.Event(), asyncio.Event()

    async def late(call: Any, *args: Any) -> Any:
        """A thread, which the last part of a command has to wait for."""
        if call is views.command_answer:
            waits.set()
            await has_one.wait()
        return await in_thread(call, *args)

    monkeypatch.setattr(views, "in_thread", late)
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    box = created.json()["id"]
    to_server: asyncio.Queue[Any] = asyncio.Queue()
    body = b'{"command": "make"}'
    from_server: asyncio.Queue[Any] = asyncio.Queue()
    scope = exec_scope(box, key, body)
    server = asyncio.create_task(Handler()(scope, to_server.get, from_server.put))
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box)
    async with asyncio.timeout(60):
        await to_server.put({"type": "http.request", "body": body})
        await waits.wait()
        await to_server.put({"type": "http.disconnect"})
        await asyncio.gather(server, return_exceptions=True)
        has_one.set()
        while not await entries.aexists():
            await asyncio.sleep(0.02)
    assert "exit_code" in (await entries.aget()).data


async def test_a_silent_command_keeps_the_connection_alive(
    stream_api: AsyncApi, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "KEEP_ALIVE_SECONDS", 0.05)
    kept_alive = asyncio.Event()

    async def silent(*args: object, **kwargs: object) -> AsyncIterator[ExecFrame]:
        yield STARTED
        await kept_alive.wait()
        yield EXITED

    monkeypatch.setattr(host, "exec_frames", silent)
    answer = await opened(stream_api, host)
    parts, comments = [], []
    async with asyncio.timeout(30):
        async for part in answer.streaming_content:
            parts.append(part)
            comments += [part] if part.startswith(b":") else []
            if len(comments) == 2:
                kept_alive.set()
    assert [json.loads(part[6:])["kind"] for part in parts if part not in comments] == [
        "exec_started",
        "exec_exited",
    ]


async def test_a_sandbox_that_does_not_run_streams_nothing(
    stream_api: AsyncApi, host: FakeHost
) -> None:
    await opened(stream_api, host, STARTED, EXITED)
    await sync_to_async(Sandbox.objects.update)(status="terminated")
    box = await sync_to_async(Sandbox.objects.get)()
    refusal(await stream_api.stream(box.pk), 409, "sandbox_not_running")


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("stream", [False, True])
def test_a_command_past_those_that_may_run_at_once_is_a_429_that_says_whose_limit(
    api: Client, host: FakeHost, box: str, team: Team, *, stream: bool
) -> None:
    TeamLimits.objects.create(team=team, max_concurrent_commands=1)
    with host.running.track(Quota(team.pk, 99)):
        answer = run(api, box, stream=stream)
        said = refusal(answer, 429, "rate_limited")
        assert int(answer["Retry-After"]) > 0
        assert (said["limit"], said["used"], said["max"]) == ("max_concurrent_commands", 1, 1)
        assert "1 of the 1 concurrent commands that your team's admins allow" in said["detail"]
    assert host.ran == []
    assert run(api, box).status_code == 200


def test_another_teams_commands_count_for_nobody_else(
    api: Client, host: FakeHost, box: str, team: Team, other_team: Team
) -> None:
    TeamLimits.objects.create(team=team, max_concurrent_commands=1)
    with host.running.track(Quota(other_team.pk, 99)):
        assert run(api, box).status_code == 200
