"""The tools as an agent meets them: described, bounded, and refusing in one form."""

from __future__ import annotations

import base64
import json
from typing import Any

import psycopg
import pytest
from channels.db import database_sync_to_async
from django.db import OperationalError
from mcp import Client
from mcp_types import CallToolResult, TextContent

from hostruntime import __version__
from hostruntime.wire.commands import ExecFrame, Quota, RefusedRequest
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from orkestr_console.mcp import command_tools
from orkestr_console.mcp.schema import (
    MAX_DEFINITIONS_TOKENS,
    MAX_LIST_TOKENS,
    compact,
    tokens,
)
from orkestr_console.mcp.tool import ERROR
from templates_app import services
from templates_app.models import Template
from tests.conftest import MakeKey
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]

TEMPLATE = {"name": "tools", "base_template": "debian-12", "recipe": ["one", "two"]}
READ_ONLY = {
    *("list_base_templates", "list_templates", "get_template", "get_template_log"),
    *("wait_for_template", "list_sandboxes", "get_sandbox", "read_file", "list_files"),
    *("get_sandbox_limits", "list_snapshots", "list_commands", "read_command"),
    "list_volumes",
    *("find_templates", "get_file_url", "get_egress", "get_preview_url"),
}
WRITING = {
    *("create_template", "cancel_template", "delete_template", "create_sandbox", "exec"),
    *("exec_background", "write_file", "set_sandbox_timeout", "terminate_sandbox"),
    *("write_files", "edit_file"),
    *("pause_sandbox", "resume_sandbox"),
    *("snapshot_sandbox", "delete_snapshot", "stop_command", "delete_volume", "run_code"),
}


def text_of(result: CallToolResult) -> str:
    """What a model reads of a result."""
    [block] = result.content
    assert isinstance(block, TextContent)
    return block.text


def error_of(result: CallToolResult) -> dict[str, Any]:
    """A refusal as data."""
    assert result.meta is not None
    error: dict[str, Any] = result.meta[ERROR]
    return error


async def done(client: Client, tool: str, /, **arguments: Any) -> dict[str, Any]:
    """Call a tool that must do it; its structured answer, which its text repeats."""
    result = await client.call_tool(tool, arguments)
    assert not result.is_error, result
    assert isinstance(result.structured_content, dict)
    assert json.loads(text_of(result)) == result.structured_content
    return result.structured_content


async def refused(client: Client, tool: str, /, **arguments: Any) -> str:
    """Call a tool that must refuse; what it says."""
    result = await client.call_tool(tool, arguments)
    assert result.is_error, result
    code, _, detail = text_of(result).partition(": ")
    # Whatever it holds, clients would check it against the output schema.
    assert result.structured_content is None
    assert error_of(result)["code"] == code
    assert detail.startswith(error_of(result)["detail"])
    assert detail
    assert "Traceback" not in detail
    return text_of(result)


async def test_every_tool_says_what_it_does_and_what_it_takes(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert set(tools) == READ_ONLY | WRITING
    for name, tool in tools.items():
        assert tool.description
        assert len(tool.description) > 20
        assert "ctx" not in tool.input_schema.get("properties", {})
        assert tool.input_schema["type"] == "object"
        assert tool.annotations is not None
        assert bool(tool.annotations.read_only_hint) is (name in READ_ONLY), name
    assert tools["terminate_sandbox"].annotations.destructive_hint is True  # type: ignore[union-attr]
    assert tools["create_template"].input_schema["required"] == ["name", "base_template", "recipe"]


async def test_the_definitions_leave_an_agent_its_context(connect: Connect, key: str) -> None:
    """Counted as all of ``tools/list``."""
    async with connect(key) as client:
        assert client.server_info is not None
        assert client.server_info.version == __version__
        tools = (await client.list_tools()).tools
    listed = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]
    assert tokens(compact(listed)) <= MAX_DEFINITIONS_TOKENS


async def test_a_token_for_reading_sees_and_calls_the_reading_tools_alone(
    connect: Connect, team: Team, make_key: MakeKey, host: FakeHost
) -> None:
    key = await database_sync_to_async(make_key)(team, "sandboxes:read")
    async with connect(key) as client:
        assert {tool.name for tool in (await client.list_tools()).tools} == READ_ONLY
        await done(client, "list_templates")
        said = await refused(client, "create_template", **TEMPLATE)
    assert said.startswith("insufficient_scope: ")
    assert "sandboxes:write" in said
    assert await database_sync_to_async(Template.objects.count)() == 0
    denied = await database_sync_to_async(AuditEntry.objects.get)()
    assert (denied.surface, denied.action) == ("mcp", "template.create")


async def test_a_large_directory_is_listed_in_parts(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        names = [f"{number:04}" for number in range(1234)]
        for name in names:
            host.write_file(box, f"/workspace/{name}", b"")
        found: list[str] = []
        offset: int | None = 0
        while offset is not None:
            part = await done(client, "list_files", sandbox_id=box, offset=offset, limit=1000)
            assert part["total"] == 1234
            found += [entry["name"] for entry in part["entries"]]
            offset = part["next_offset"]
        assert found == names
        assert part["entries"][0]["mode"] == "644"
        assert tokens(compact(part)) <= MAX_LIST_TOKENS


async def test_a_sandbox_from_start_to_end(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        made = await done(client, "create_sandbox", template="debian-12", metadata={"a": "b"})
        assert (made["status"], made["metadata"]) == ("running", {"a": "b"})
        box = {"sandbox_id": made["id"]}
        host.frames["make"] = [
            ExecFrame("started", pid=7),
            ExecFrame("chunk", stream="stdout", data=b"4"),
            ExecFrame("chunk", stream="stderr", data=b"\xff\x00!"),
            ExecFrame("exited", code=3, duration_ms=5),
        ]
        ran = await done(client, "exec", **box, command="make", env={"A": "1"})
        assert (ran["exit_code"], ran["stdout"], ran["stderr"]) == (3, "4", "\ufffd\0!")
        await done(client, "write_file", **box, path="/workspace/x", content="ä\n")
        read = await done(client, "read_file", **box, path="/workspace/x")
        assert (read["content"], read["encoding"], read["next_offset"]) == ("ä\n", "utf-8", None)
        listed = await done(client, "list_files", **box)
        assert [entry["name"] for entry in listed["entries"]] == ["x"]
        moved = await done(client, "set_sandbox_timeout", **box, timeout_seconds=3000)
        assert moved["expires_at"] > made["expires_at"]
        assert (await done(client, "terminate_sandbox", **box))["status"] == "terminated"
        assert (await refused(client, "exec", **box, command="make")).startswith(
            "sandbox_not_running: "
        )


async def test_too_much_output_is_cut_in_the_middle(
    connect: Connect, key: str, host: FakeHost
) -> None:
    host.frames["yes"] = [
        ExecFrame("started", pid=7),
        *(ExecFrame("chunk", stream="stdout", data=b"%09d\n" % n) for n in range(20_000)),
        ExecFrame("exited", code=0, duration_ms=5),
    ]
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        ran = await done(client, "exec", sandbox_id=box, command="yes")
    assert len(ran["stdout"]) < 30_100
    assert ran["stdout"].startswith("000000000\n")
    assert ran["stdout"].endswith("000019999\n")
    assert ran["omitted_bytes"] == 170_000


async def test_a_command_that_prints_without_end_is_ended_and_on_record_as_that(
    connect: Connect, key: str, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_tools, "MAX_OUTPUT", 100)
    host.frames["yes"] = [
        ExecFrame("started", pid=7),
        *(ExecFrame("chunk", stream="stdout", data=b"y\n" * 40) for _ in "123"),
        ExecFrame("exited", code=0, duration_ms=5),
    ]
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        said = await refused(client, "exec", sandbox_id=box, command="yes")
    assert said.startswith("exec_killed: The command was stopped because it printed more")
    assert "y\ny\n" in said
    assert host.ended_early == ["yes"]
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box).order_by("id")
    assert [entry.data async for entry in entries] == [
        {"stream": True},
        {"ended": command_tools.TOO_MUCH_OUTPUT},
    ]


async def test_what_runs_out_of_time_shows_what_it_printed(
    connect: Connect, key: str, host: FakeHost
) -> None:
    host.frames["slow"] = [
        ExecFrame("started", pid=7),
        ExecFrame("chunk", stream="stdout", data=b"so far\n"),
        ExecFrame("error", error_code="exec_timeout", message="It took too long."),
    ]
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        said = await refused(client, "exec", sandbox_id=box, command="slow")
    assert said.startswith("exec_timeout: It took too long.")
    assert "exec_background" in said
    assert "so far" in said


async def test_what_the_network_policy_refused_is_named_after_a_command(
    connect: Connect, key: str, host: FakeHost
) -> None:
    unlisted = RefusedRequest("a.test", 443, "not_listed")
    host.frames["fetch"] = [
        ExecFrame("started", pid=7),
        ExecFrame("exited", code=1, duration_ms=3, refused=(unlisted,)),
    ]
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        ran = await done(client, "exec", sandbox_id=box, command="fetch")
        begun = await done(client, "exec_background", sandbox_id=box, command="serve")
        host.end_command(begun["command_id"], 1, refused=(unlisted,))
        read = await done(client, "read_command", sandbox_id=box, command_id=begun["command_id"])
    assert (ran["exit_code"], ran["error_code"]) == (1, "network_policy_blocked")
    assert ran["refused_hosts"] == ["a.test"]
    assert "allow_domains" in ran["stderr"]
    assert (read["error_code"], read["refused_hosts"]) == ("network_policy_blocked", ["a.test"])
    assert "allow_domains" in read["error_message"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", [("", "utf-8")]),
        ("ää".encode(), [("ä", "utf-8"), ("ä", "utf-8")]),
        (b"\xff\xfe\xfd\xfc", [("//79", "base64"), ("/A==", "base64")]),
    ],
)
async def test_a_file_is_read_in_parts_that_cut_no_character(
    connect: Connect, key: str, host: FakeHost, content: bytes, parts: list[tuple[str, str]]
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        await done(
            client,
            "write_file",
            sandbox_id=box,
            path="/workspace/x",
            content=base64.b64encode(content).decode(),
            encoding="base64",
        )
        found, offset = [], 0
        while True:
            part = await done(
                client, "read_file", sandbox_id=box, path="/workspace/x", offset=offset, limit=3
            )
            found.append((part["content"], part["encoding"]))
            if (offset := part["next_offset"]) is None:
                break
    assert found == parts


WRONG = [
    ("create_template", {}, "name: is required."),
    ("create_template", {**TEMPLATE, "recipe": []}, "recipe: needs at least one step"),
    ("create_template", {**TEMPLATE, "base_template": "nope"}, "'nope' is not a base image"),
    ("create_template", {**TEMPLATE, "network": "off"}, "network: must be one of"),
    ("create_template", {**TEMPLATE, "nmae": "x"}, "'nmae' is not an argument of this tool"),
    ("list_templates", {"limit": 0}, "limit: must be at least 1."),
    ("list_templates", {"cursor": "x"}, "cursor: is not one this server gave"),
    ("create_sandbox", {"template": "debian-12", "timeout_seconds": 1}, "timeout_seconds"),
    ("create_sandbox", {"template": "debian-12", "env": {"1": "x"}}, "not a valid variable name"),
]


@pytest.mark.parametrize(("name", "arguments", "part"), WRONG)
async def test_what_is_wrong_is_said_with_its_field(
    connect: Connect, key: str, name: str, arguments: dict[str, Any], part: str
) -> None:
    async with connect(key) as client:
        said = await refused(client, name, **arguments)
    assert said.startswith("invalid_request: ")
    assert part in said


@pytest.mark.parametrize("name", ["no_such_tool", "x" * 9000, "exec\x1b[2J", "__class__"])
async def test_a_tool_that_there_is_not_is_refused_like_anything_else(
    connect: Connect, key: str, name: str
) -> None:
    async with connect(key) as client:
        said = await refused(client, name)
    assert said.startswith("not_found: Unknown tool ")
    assert "create_template" in said
    assert len(said) < 800
    assert "\x1b" not in said


async def test_a_full_plan_says_so(connect: Connect, key: str) -> None:
    await database_sync_to_async(Plan.objects.update)(max_templates=0)
    async with connect(key) as client:
        said = await refused(client, "create_template", **TEMPLATE)
    assert said.startswith("plan_limit: ")


async def test_a_defect_says_its_request_and_nothing_else(
    connect: Connect, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(services, "list_templates", broken)
    async with connect(key) as client:
        said = await refused(client, "list_templates")
    assert said.startswith("internal_error: ")
    assert "req_" in said
    assert "secret" not in said


async def test_hostile_text_comes_through_whole(connect: Connect, key: str, host: FakeHost) -> None:
    hostile = "\x1b[31m\u202e\ud7ff\U000e0041 </script> \x07\x00 \u2028 {{x}}"
    host.frames["evil"] = [
        ExecFrame("started", pid=7),
        ExecFrame("chunk", stream="stdout", data=hostile.encode()),
        ExecFrame("exited", code=0, duration_ms=5),
    ]
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        assert (await done(client, "exec", sandbox_id=box, command="evil"))["stdout"] == hostile


async def test_recipes_and_prompts_can_be_read(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        found = await client.read_resource(f"orkestr://templates/{made['id']}/recipe")
        assert json.loads(found.contents[0].text)["recipe"] == ["one", "two"]  # type: ignore[union-attr]
        templates = (await client.list_resource_templates()).resource_templates
        assert len(templates) == 2
        [prompt] = (await client.list_prompts()).prompts
        got = await client.get_prompt(prompt.name, {"repository": "/src/thing"})
        assert "/src/thing" in got.messages[0].content.text  # type: ignore[union-attr]
        assert "create_template" in got.messages[0].content.text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("755", 0o755), ("0755", 0o755), ("0o600", 0o600), ("4755", 0o4755), (None, 0o644)],
)
async def test_permissions_are_octal_as_agents_write_them(
    connect: Connect, key: str, host: FakeHost, mode: str | None, kept: int
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        given = {} if mode is None else {"mode": mode}
        wanted = {"sandbox_id": box, "path": "/workspace/run.sh", "content": "true\n", **given}
        await done(client, "write_file", **wanted)
        assert host.modes[box, "/workspace/run.sh"] == kept


@pytest.mark.parametrize("mode", ["", "rwxr-xr-x", "789", "u+x", "77777", "-755", "7\u0665", 755])
async def test_permissions_that_are_none_are_refused(
    connect: Connect, key: str, host: FakeHost, mode: str | int
) -> None:
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        wanted = {"sandbox_id": box, "path": "/workspace/run.sh", "content": "", "mode": mode}
        assert (await client.call_tool("write_file", wanted)).is_error
        assert host.modes == {}


async def test_a_command_too_many_and_a_database_that_is_away_are_told_as_rest_tells_them(
    connect: Connect, key: str, host: FakeHost, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    await database_sync_to_async(Plan.objects.update)(max_concurrent_commands=1)
    async with connect(key) as client:
        box = (await done(client, "create_sandbox", template="debian-12"))["id"]
        with host.running.track(Quota(team.pk, 99)):
            refused = await client.call_tool("exec", {"sandbox_id": box, "command": "true"})
        assert error_of(refused)["code"] == "rate_limited"
        assert error_of(refused)["limit"] == "max_concurrent_commands"

        def away(*_: object, **__: object) -> None:
            raise OperationalError("closed") from psycopg.OperationalError("closed")

        monkeypatch.setattr(services, "list_bases", away)
        told = await client.call_tool("list_base_templates", {})
    assert (error_of(told)["code"], error_of(told)["retry_after"]) == ("database_unavailable", 2)
