"""``/v1/sandboxes/{id}/commands``: background commands, and what they print."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, connections
from django.test import AsyncClient, Client

from hostruntime.errors import CwdNotFound, Held, HostUnavailable, NoSpace, TooManyCommands
from hostruntime.wire.commands import RefusedRequest
from orkestr_console.accounts.models import Team
from orkestr_console.accounts.services import mint_token
from sandboxes_app.models import Sandbox
from sandboxes_app.services import background
from tests.api.asking import post, refusal
from tests.conftest import api_client
from tests.fakes.host import FakeHost

FOLLOWERS = 200
REFUSED = (RefusedRequest("a.test", 443, "not_listed"),)


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    answer = post(api, "/v1/sandboxes", {"template": "debian-12", "env": {"A": "1", "B": "2"}})
    return f"/v1/sandboxes/{answer.json()['id']}"


def begin(api: Client, box: str, **fields: Any) -> dict[str, Any]:
    answer = post(api, f"{box}/commands", {"command": "serve", **fields})
    assert answer.status_code == 201
    return dict(answer.json())


def test_it_is_answered_as_the_contract_has_it(api: Client, host: FakeHost, box: str) -> None:
    begun = begin(api, box, cwd="/tmp", env={"B": "3"})
    assert begun["id"].startswith("cmd_")
    assert (begun["command"], begun["pid"], begun["status"]) == ("serve", 17, "running")
    assert begun["exit_code"] is None
    assert begun["started_at"].endswith("Z")
    [started] = host.background[box.rpartition("/")[2]].values()
    assert (started.request.cwd, started.request.env) == ("/tmp", {"A": "1", "B": "3"})
    assert api.get(f"{box}/commands/{begun['id']}").json() == begun
    second = begin(api, box)
    listed = api.get(f"{box}/commands").json()
    assert [each["id"] for each in listed["commands"]] == [second["id"], begun["id"]]


@pytest.mark.parametrize(
    ("code", "signal", "status", "exit_code"),
    [(0, None, "exited", 0), (3, None, "exited", 3), (139, 11, "killed", None)],
)
def test_how_it_ended_is_kept(
    api: Client,
    host: FakeHost,
    box: str,
    code: int,
    signal: int | None,
    status: str,
    exit_code: int | None,
) -> None:
    name = begin(api, box)["id"]
    host.end_command(name, code, signal)
    said = api.get(f"{box}/commands/{name}").json()
    assert (said["status"], said["exit_code"], said["signal"]) == (status, exit_code, signal)


def test_what_the_network_policy_refused_is_named_wherever_its_end_is(
    api: Client, host: FakeHost, box: str
) -> None:
    name = begin(api, box)["id"]
    host.print_more(name, b"no way\n")
    host.end_command(name, 7, refused=REFUSED)
    found = [api.get(f"{box}/commands/{name}").json(), api.get(f"{box}/commands").json()]
    logs = api.get(f"{box}/commands/{name}/logs").json()
    for said in (found[0], found[1]["commands"][0], logs):
        assert (said["error_code"], said["refused_hosts"]) == ("network_policy_blocked", ["a.test"])
        assert "While this command ran" in said["error_message"]
    # The official clients show nothing else; whoever goes on from there does not get it again.
    notice = f"\n[network_policy_blocked: {logs['error_message']}]\n"
    assert (logs["content"], logs["size"]) == (f"no way\n{notice}", 7)
    assert logs["next_offset"] == 7 + len(notice.encode())
    for offset, content in ((7, notice), (8, ""), (logs["next_offset"], "")):
        said = api.get(f"{box}/commands/{name}/logs?offset={offset}").json()
        assert said["content"] == content
        # Nor whoever asks once more than there is to ask for.
        assert said["next_offset"] >= offset


def test_what_is_printed_after_a_refused_command_has_ended_is_not_left_out(
    api: Client, host: FakeHost, box: str
) -> None:
    name = begin(api, box)["id"]
    host.print_more(name, b"no way\n")
    host.end_command(name, 7, refused=REFUSED, active=True)
    logs = api.get(f"{box}/commands/{name}/logs").json()
    assert logs["error_code"] == "network_policy_blocked"
    host.print_more(name, b"by what it left\n")
    host.end_command(name, 7, refused=REFUSED)
    rest = api.get(f"{box}/commands/{name}/logs?offset={logs['next_offset']}").json()
    assert logs["content"] + rest["content"].partition("\n[")[0] == "no way\nby what it left\n"
    assert "network_policy_blocked" in rest["content"]


def test_killing_is_idempotent_and_keeps_it(api: Client, host: FakeHost, box: str) -> None:
    name, done = begin(api, box)["id"], begin(api, box)["id"]
    host.end_command(done, 4)
    for each in (name, name, done):
        assert api.delete(f"{box}/commands/{each}").status_code == 204
    said = api.get(f"{box}/commands/{name}").json()
    assert (said["status"], said["exit_code"]) == ("killed", None)
    assert api.get(f"{box}/commands/{done}").json()["exit_code"] == 4


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (TooManyCommands("16 run.", running=16), 409, "too_many_commands"),
        (CwdNotFound("There is no /x."), 400, "cwd_not_found"),
        (NoSpace("It is full."), 409, "no_space"),
        (Held("The machine is low on disk space."), 503, "host_unavailable"),
    ],
)
def test_why_it_cannot_be_started_is_said(
    api: Client, host: FakeHost, box: str, error: Any, status: int, code: str
) -> None:
    host.start_fails = error
    refused = post(api, f"{box}/commands", {"command": "serve"})
    assert refusal(refused, status, code)["detail"] == error.detail
    assert ("Retry-After" in refused.headers) == (status == 503)


@pytest.mark.parametrize(
    "body",
    [{}, {"command": ""}, {"command": "x", "stream": True}, {"command": "x", "cwd": "tmp"}],
)
def test_what_is_wrong_in_a_body_is_said(api: Client, box: str, body: dict[str, Any]) -> None:
    refusal(post(api, f"{box}/commands", body), 400, "invalid_request")


@pytest.mark.parametrize("name", ["cmd_01ARZ3NDEKTSV4RRFFQ69G5FAV", "x", "..%2f..", "cmd_"])
def test_what_is_not_a_command_is_not_found(api: Client, box: str, name: str) -> None:
    for call in (api.get, api.delete):
        assert call(f"{box}/commands/{name}").status_code == 404
    assert api.get(f"{box}/commands/{name}/logs?follow=true").status_code == 404


def test_a_command_of_another_sandbox_is_not_found(api: Client, host: FakeHost, box: str) -> None:
    other = post(api, "/v1/sandboxes", {"template": "debian-12"}).json()["id"]
    name = begin(api, box)["id"]
    answer = api.get(f"/v1/sandboxes/{other}/commands/{name}")
    refusal(answer, 404, "command_not_found")


def test_a_paused_sandboxes_commands_can_be_read_and_killed(
    api: Client, host: FakeHost, box: str
) -> None:
    name = begin(api, box)["id"]
    host.print_more(name, b"before\n")
    assert api.post(f"{box}/pause").status_code == 200
    assert api.get(f"{box}/commands/{name}").json()["status"] == "running"
    assert len(api.get(f"{box}/commands").json()["commands"]) == 1
    assert api.get(f"{box}/commands/{name}/logs").json()["content"] == "before\n"
    refusal(post(api, f"{box}/commands", {"command": "x"}), 409, "sandbox_not_running")
    assert api.delete(f"{box}/commands/{name}").status_code == 204


def test_a_sandbox_that_has_ended_says_so(api: Client, host: FakeHost, box: str) -> None:
    name = begin(api, box)["id"]
    host.end(box.rpartition("/")[2], "exited")
    refusal(api.get(f"{box}/commands/{name}"), 409, "sandbox_not_running")
    assert Sandbox.objects.get().status == "failed"
    for path in ("commands", f"commands/{name}", f"commands/{name}/logs"):
        refusal(api.get(f"{box}/{path}"), 409, "sandbox_not_running")


def test_a_token_that_may_only_read_reads(
    api: Client, host: FakeHost, box: str, team: Team
) -> None:
    name = begin(api, box)["id"]
    reader = api_client(mint_token(team, "Reader", ["sandboxes:read"])[1])
    assert reader.get(f"{box}/commands/{name}/logs").status_code == 200
    refusal(reader.delete(f"{box}/commands/{name}"), 403, "insufficient_scope")


# Logs by offset -----------------------------------------------------------------------------


def logs(api: Client, box: str, name: str, offset: int = 0) -> dict[str, Any]:
    answer = api.get(f"{box}/commands/{name}/logs", {"offset": offset})
    assert answer.status_code == 200
    return dict(answer.json())


def test_a_part_of_the_log_begins_where_it_was_asked_for(
    api: Client, host: FakeHost, box: str
) -> None:
    name = begin(api, box)["id"]
    assert logs(api, box, name) == {
        **{"content": "", "size": 0, "truncated": False},
        **{"offset": 0, "next_offset": 0, "dropped": 0},
    }
    host.print_more(name, b"one\ntwo\n")
    said = logs(api, box, name, 4)
    assert (said["content"], said["size"], said["truncated"]) == ("two\n", 8, False)
    assert logs(api, box, name, 8)["content"] == ""
    assert logs(api, box, name, 100)["content"] == ""


def test_parts_are_cut_between_characters_and_make_up_the_whole(
    api: Client, host: FakeHost, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the official client reads: it goes on at its offset and the length in UTF-8."""
    monkeypatch.setattr(background, "MAX_PART_BYTES", 10)
    name = begin(api, box)["id"]
    text = "aä€😀" * 20
    host.print_more(name, text.encode())
    content, offset = "", 0
    while True:
        said = logs(api, box, name, offset)
        content += said["content"]
        offset += len(said["content"].encode())
        assert offset == said["next_offset"]
        if not said["truncated"]:
            break
    assert content == text


def test_half_a_character_waits_for_its_other_half_unless_there_is_none(
    api: Client, host: FakeHost, box: str
) -> None:
    name = begin(api, box)["id"]
    host.print_more(name, "€".encode()[:2])
    said = logs(api, box, name)
    assert (said["content"], said["size"], said["truncated"]) == ("", 2, False)
    host.print_more(name, "€".encode()[2:])
    assert logs(api, box, name)["content"] == "€"
    host.print_more(name, "€".encode()[:2])
    host.end_command(name)
    assert logs(api, box, name, 3)["content"] == "??"


def test_bytes_that_are_no_characters_keep_the_count(api: Client, host: FakeHost, box: str) -> None:
    name = begin(api, box)["id"]
    data = bytes(range(256)) * 3 + b"end"
    host.print_more(name, data)
    host.end_command(name)
    said = logs(api, box, name)
    assert len(said["content"].encode()) == len(data)
    assert said["content"].endswith("end")


def test_what_is_not_kept_any_more_is_counted_and_nothing_comes_twice(
    api: Client, host: FakeHost, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is kept comes at once: the official client cannot be told where to go on."""
    monkeypatch.setattr(background, "MAX_PART_BYTES", 10)
    name = begin(api, box)["id"]
    command = host.background[box.rpartition("/")[2]][name]
    host.print_more(name, "€".encode() * 40)
    command.first = 31
    said = logs(api, box, name)
    assert said["content"] == "€" * 29
    assert (said["dropped"], said["offset"], said["truncated"]) == (31, 33, False)
    assert said["next_offset"] == said["size"] == 120


@pytest.mark.parametrize(
    "query",
    ["offset=-1", "offset=x", "offset=1e3", f"offset={10**30}", "follow=true&timeout_seconds=0"],
)
def test_a_number_that_is_none_is_refused(
    api: Client, host: FakeHost, box: str, query: str
) -> None:
    name = begin(api, box)["id"]
    said = refusal(api.get(f"{box}/commands/{name}/logs?{query}"), 400, "invalid_request")
    assert "must be a whole number from" in said["detail"]


# Logs followed ------------------------------------------------------------------------------


class Followed:
    """A command of a sandbox, through ASGI, as the server runs it."""

    def __init__(self, host: FakeHost, key: str) -> None:
        self.host, self.name, self.box = host, "", ""
        self._client = AsyncClient()
        # The client's own default headers reach WSGI alone.
        self._headers = {"Authorization": f"Bearer {key}"}

    async def begin(self) -> None:
        """Boot a sandbox, and start a command in it."""
        made = await self._post("/v1/sandboxes", {"template": "debian-12"})
        self.box = f"/v1/sandboxes/{made['id']}"
        self.name = (await self._post(f"{self.box}/commands", {"command": "serve"}))["id"]

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: Any = await self._client.post(
            path, body, content_type="application/json", headers=self._headers
        )
        assert answer.status_code == 201, answer.content
        return dict(answer.json())

    async def get(self, query: str = "") -> Any:
        """The answer to following it."""
        path = f"{self.box}/commands/{self.name}/logs?follow=true{query}"
        return await self._client.get(path, headers=self._headers)

    async def frames(self, query: str = "") -> list[dict[str, Any]]:
        """The frames, all of them."""
        answer = await self.get(query)
        assert answer.status_code == 200, answer.content
        text = b"".join([part async for part in answer.streaming_content]).decode()
        lines = [line for line in text.split("\n") if line.startswith("data: ")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until it holds."""
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)


@pytest.fixture
async def followed(plans: None, host: FakeHost, key: str) -> AsyncIterator[Followed]:
    command = Followed(host, key)
    await command.begin()
    yield command
    # The views ran in asgiref's own thread, whose connection nobody else would close.
    await sync_to_async(connections.close_all)()


async def test_followed_they_are_the_frames_of_exec(followed: Followed) -> None:
    followed.host.print_more(followed.name, b"one\ntwo\n")
    followed.host.end_command(followed.name, 3)
    answer = await followed.get("&offset=4&timeout_seconds=20")
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert await followed.frames("&offset=4&timeout_seconds=20") == [
        {"kind": "exec_started", "pid": 17},
        {"kind": "exec_chunk", "stream": "stdout", "data": base64.b64encode(b"two\n").decode()},
        {"kind": "exec_exited", "code": 3, "duration_ms": 12},
    ]


async def test_followed_its_end_names_what_was_refused(followed: Followed) -> None:
    followed.host.end_command(followed.name, 7, refused=REFUSED)
    _, notice, last = await followed.frames()
    assert (last["kind"], last["code"], last["refused_hosts"]) == ("exec_exited", 7, ["a.test"])
    assert notice["stream"] == "stderr"
    said = base64.b64decode(notice["data"]).decode()
    assert said == f"\n[network_policy_blocked: {last['error_message']}]\n"
    followed.host.end_command(followed.name, 139, 11, refused=REFUSED)
    _, last = await followed.frames()
    assert (last["kind"], last["code"], last["refused_hosts"]) == (
        "error",
        "exec_killed",
        ["a.test"],
    )
    assert last["message"].endswith(last["error_message"])


async def test_followed_past_its_time_it_says_so_and_goes_on(followed: Followed) -> None:
    followed.host.print_more(followed.name, b"one\n")
    *_, last = await followed.frames("&timeout_seconds=1")
    assert (last["kind"], last["code"]) == ("error", "exec_timeout")
    assert "offset 4" in last["message"]
    assert followed.host.command(followed.box.rpartition("/")[2], followed.name).running


async def test_followed_a_killed_one_ends_with_its_signal(followed: Followed) -> None:
    followed.host.kill_command(followed.box.rpartition("/")[2], followed.name)
    *_, last = await followed.frames()
    assert (last["kind"], last["code"], last["signal"]) == ("error", "exec_killed", 15)


async def test_a_restart_of_the_agent_is_not_noticed(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    host = followed.host
    host.print_more(followed.name, "a€".encode()[:3])
    following = asyncio.create_task(followed.frames())
    await followed.until(lambda: host.followers == 1)
    await asyncio.sleep(0.05)
    host.down = True
    await followed.until(lambda: host.followers == 0)
    host.print_more(followed.name, "€z".encode()[2:])
    host.end_command(followed.name)
    await asyncio.sleep(0.05)
    host.down = False
    frames = await following
    chunks = [base64.b64decode(each["data"]) for each in frames if each["kind"] == "exec_chunk"]
    assert [chunk.decode() for chunk in chunks] == ["a", "€z"]
    assert frames[-1]["kind"] == "exec_exited"


async def test_an_agent_that_stays_away_ends_it(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.01)
    following = asyncio.create_task(followed.frames())
    await followed.until(lambda: followed.host.followers == 1)
    followed.host.down = True
    assert (await following)[-1]["code"] == HostUnavailable.code


async def test_what_was_overwritten_before_it_was_read_is_counted(followed: Followed) -> None:
    host = followed.host
    command = host.background[followed.box.rpartition("/")[2]][followed.name]
    host.print_more(followed.name, b"x" * 5000 + b"end")
    command.first = 5000
    host.end_command(followed.name)
    _, notice, kept, last = await followed.frames("&offset=10")
    assert "4,990 bytes" in base64.b64decode(notice["data"]).decode()
    assert base64.b64decode(kept["data"]) == b"end"
    assert last["kind"] == "exec_exited"


async def test_many_followers_hold_neither_threads_nor_connections(followed: Followed) -> None:
    host, before = followed.host, threading.active_count()
    following: list[asyncio.Task[Any]] = []
    for _ in range(FOLLOWERS):
        following.append(asyncio.create_task(followed.frames()))
        await followed.until(lambda: host.followers == len(following))
    assert threading.active_count() < before + FOLLOWERS // 4
    # The one that asks, which is none of theirs.
    assert await sync_to_async(connections_in_use)() == 1
    for task in following[::2]:
        task.cancel()
    await asyncio.gather(*following[::2], return_exceptions=True)
    assert host.followers == FOLLOWERS // 2
    host.end_command(followed.name)
    for frames in await asyncio.gather(*following[1::2]):
        assert frames[-1]["kind"] == "exec_exited"
    assert host.followers == 0


def connections_in_use() -> int:
    """How many connections to the database are doing something, or are in a transaction."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND backend_type = 'client backend' AND state <> 'idle'"
        )
        return int(cursor.fetchone()[0])
