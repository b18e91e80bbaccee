"""Who gets in: a token in every request, this site's own pages, and no session to steal."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest
from channels.db import database_sync_to_async

from orkestr_console.accounts.models import ApiToken, Plan, Team
from orkestr_console.core.addresses import MCP_PATH
from tests.conftest import MakeKey
from tests.mcp.conftest import URL, Connect, http_client
from tests.mcp.test_tools import done

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host", "connect")]

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    },
}
LIST = {"jsonrpc": "2.0", "id": 2, "method": "tools/list", "params": {}}
ACCEPT = {"Accept": "application/json, text/event-stream"}


async def asked(key: str | None, body: Any = INITIALIZE, **headers: str) -> httpx2.Response:
    """One request, as any HTTP client sends it."""
    async with http_client(key, **ACCEPT, **headers) as http:
        return await http.post(URL, json=body)


async def test_nobody_gets_in_without_a_token(key: str) -> None:
    for wrong in (None, "", "ork_wrong", key[:-1], f"{key}x", "ork_AAAAAAAA_" + "B" * 32):
        answer = await asked(wrong)
        assert answer.status_code == 401, wrong
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert answer.json()["code"] == "unauthenticated"
        assert answer.headers["x-request-id"].startswith("req_")


async def test_a_token_that_was_revoked_is_out_at_once(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        await done(client, "list_templates")
    from django.utils import timezone

    await database_sync_to_async(ApiToken.objects.update)(revoked_at=timezone.now())
    assert (await asked(key)).status_code == 401


async def test_a_cookie_is_no_token(key: str) -> None:
    assert (await asked(None, Cookie="sessionid=x")).status_code == 401


async def test_calling_too_often_is_answered_with_a_wait(key: str) -> None:
    await database_sync_to_async(Plan.objects.update)(api_requests_per_minute=1)
    assert (await asked(key)).status_code == 200
    answer = await asked(key)
    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "testserver.evil.example"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver"}, 200),
        ({}, 200),
    ],
)
async def test_other_sites_pages_stay_out(key: str, headers: dict[str, str], status: int) -> None:
    answer = await asked(key, **headers)
    assert answer.status_code == status


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "OPTIONS", "HEAD"])
async def test_there_is_no_stream_and_no_session_to_end(key: str, method: str) -> None:
    async with http_client(key, **ACCEPT) as http:
        answer = await http.request(method, URL)
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


async def test_answers_carry_the_consoles_headers_and_a_session_that_nobody_keeps(
    key: str,
) -> None:
    sessions = {(await asked(key)).headers["mcp-session-id"] for _ in "12"}
    assert len(sessions) == 2
    answer = await asked(key, LIST, **{"MCP-Session-Id": "of another server"})
    assert answer.status_code == 200
    assert answer.headers["cache-control"] in {"no-store", "no-cache, no-transform"}
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "mcp-session-id" not in answer.headers


async def test_a_request_needs_none_before_it(key: str) -> None:
    """Whichever process gets it: there is no handshake to have been there for."""
    answer = await asked(key, LIST, **{"MCP-Protocol-Version": "2025-06-18"})
    assert answer.status_code == 200
    assert "create_template" in answer.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b'{"jsonrpc": "2.0"}', b"[" * 100_000]
)
async def test_what_is_no_message_is_refused(key: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", **ACCEPT}
    async with http_client(key, **headers) as http:
        answer = await http.post(URL, content=body)
    assert 400 <= answer.status_code < 500
    assert "Traceback" not in answer.text


async def test_the_address_with_a_slash_is_the_same(key: str) -> None:
    async with http_client(key, **ACCEPT) as http:
        assert (await http.post(f"{URL}/", json=INITIALIZE)).status_code == 200
        assert (
            await http.post(f"http://testserver{MCP_PATH}x", json=INITIALIZE)
        ).status_code == 404


async def test_another_teams_resources_are_not_there(
    connect: Connect, key: str, other_team: Team, make_key: MakeKey
) -> None:
    body = {"name": "x", "base_template": "debian-12", "recipe": ["true"]}
    async with connect(key) as client:
        made = await done(client, "create_template", **body)
    theirs = await database_sync_to_async(make_key)(other_team)
    async with connect(theirs) as client:
        for part in ("recipe", "log"):
            with pytest.raises(Exception, match="not_found"):
                await client.read_resource(f"orkestr://templates/{made['id']}/{part}")
