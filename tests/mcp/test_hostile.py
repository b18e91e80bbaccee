"""Text that nothing can store, in every argument: refused as REST refuses it, nothing is done."""

from __future__ import annotations

import json
from typing import Any

import pytest
from channels.db import database_sync_to_async

from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.fakes.host import FakeHost
from tests.mcp.conftest import URL, Connect, http_client
from tests.mcp.test_tools import TEMPLATE, done

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]

# The two ways in: with the handshake of before, and each request by itself.
ERAS = ("2025-06-18", "2026-07-28")
NUL, HALF = "a\0b", "a\ud800b"
BOX = {"template": "debian-12"}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_template", {"template_id": "@"}),
    ("get_template_log", {"template_id": "@"}),
    ("wait_for_template", {"template_id": "@"}),
    ("cancel_template", {"template_id": "@"}),
    ("delete_template", {"template_id": "@"}),
    ("list_templates", {"cursor": "@"}),
    ("list_sandboxes", {"status": "@"}),
    ("list_sandboxes", {"metadata": {"a": "@"}}),
    ("create_template", {**TEMPLATE, "name": "@"}),
    ("create_template", {**TEMPLATE, "base_template": "@"}),
    ("create_template", {**TEMPLATE, "recipe": ["@"]}),
    ("create_template", {**TEMPLATE, "allow_domains": ["@"]}),
    ("create_sandbox", {"template": "@"}),
    ("create_sandbox", {**BOX, "metadata": {"a": "@"}}),
    ("create_sandbox", {**BOX, "metadata": {"@": "a"}}),
    ("create_sandbox", {**BOX, "env": {"A": "@"}}),
    ("create_sandbox", {**BOX, "network": "restricted", "allow_domains": ["@"]}),
    ("get_sandbox", {"sandbox_id": "@"}),
    ("exec", {"sandbox_id": "#", "command": "@"}),
    ("exec", {"sandbox_id": "#", "command": "true", "cwd": "/@"}),
    ("exec_background", {"sandbox_id": "#", "command": "@"}),
    ("read_command", {"sandbox_id": "#", "command_id": "@"}),
    ("stop_command", {"sandbox_id": "#", "command_id": "@"}),
    ("write_file", {"sandbox_id": "#", "path": "/tmp/@", "content": "x"}),
    ("read_file", {"sandbox_id": "#", "path": "/tmp/@"}),
    ("list_files", {"sandbox_id": "#", "path": "/@"}),
    ("list_templates", {"@": 1}),
]


async def called(key: str, era: str, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the server answers to a call whose text the SDK's client would not send."""
    params: dict[str, Any] = {"name": tool, "arguments": arguments}
    headers = {
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "MCP-Protocol-Version": era,
    }
    if era == ERAS[1]:
        headers |= {"Mcp-Method": "tools/call", "Mcp-Name": tool}
        keys = ("protocolVersion", "clientCapabilities")
        params["_meta"] = dict(
            zip((f"io.modelcontextprotocol/{one}" for one in keys), (era, {}), strict=True)
        )
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}
    async with http_client(key, **headers) as http:
        answer = await http.post(URL, content=json.dumps(body).encode())
    assert answer.status_code in {200, 400}, answer.text
    said = next((one[6:] for one in answer.text.split("\r\n") if one.startswith("data: {")), None)
    found: dict[str, Any] = json.loads(said or answer.text)
    return found


def put(value: Any, bad: str, box: str) -> Any:
    """The arguments with the bad text and the sandbox's id put in."""
    if isinstance(value, str):
        return value.replace("@", bad).replace("#", box)
    if isinstance(value, list):
        return [put(one, bad, box) for one in value]
    if isinstance(value, dict):
        return {put(name, bad, box): put(one, bad, box) for name, one in value.items()}
    return value


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("bad", [NUL, HALF], ids=["NUL", "half a pair"])
async def test_text_that_nothing_can_store_is_the_callers_mistake(
    connect: Connect, key: str, host: FakeHost, era: str, bad: str
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", **BOX))["id"]
    for tool, arguments in CALLS:
        answer = await called(key, era, tool, put(arguments, bad, box))
        if "error" in answer:
            # The message itself is no JSON that anybody could read.
            assert answer["error"]["code"] == -32700, (tool, answer)
            continue
        assert answer["result"]["isError"], (tool, arguments)
        text = answer["result"]["content"][0]["text"]
        assert text.startswith("invalid_request: "), (tool, text)
    assert not await database_sync_to_async(Template.objects.exists)()
    assert await database_sync_to_async(Sandbox.objects.count)() == 1
    assert host.ran == []


@pytest.mark.parametrize("era", ERAS)
async def test_a_files_text_may_hold_nul_but_no_half_a_character(
    connect: Connect, key: str, host: FakeHost, era: str
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", **BOX))["id"]
    file = {"sandbox_id": box, "path": "/tmp/x"}
    whole = await called(key, era, "write_file", {**file, "content": NUL})
    assert whole["result"]["structuredContent"]["bytes_written"] == 3
    half = await called(key, era, "write_file", {**file, "content": HALF})
    if era == ERAS[1]:
        assert "encoding 'base64'" in half["result"]["content"][0]["text"]
    else:
        assert half["error"]["code"] == -32700
    assert host.booted[box].files["/tmp/x"] == NUL.encode()
