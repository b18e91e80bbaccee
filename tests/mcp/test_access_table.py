"""Who may call which tool: every tool × every kind of token, in one table.

``tests/api/test_access_table.py`` has the same for REST and the console. A tool that is not in the
table fails the first test.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from channels.db import database_sync_to_async

from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import ExecFrame
from orkestr_console.accounts.actor import READ, WRITE, system_actor
from orkestr_console.accounts.models import Team
from orkestr_console.accounts.services import mint_token
from orkestr_console.mcp.server import TOOLS
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import BackgroundSpec, SandboxSpec, SnapshotSpec, VolumeSpec
from templates_app import services as templates
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import error_of

pytestmark = pytest.mark.django_db(transaction=True)

OK, NO, GONE = "ok", "insufficient_scope", "not_found"


@dataclass(frozen=True)
class Row:
    """A tool: what a stranger's token gets, and whether one for reading may call it."""

    tool: str
    stranger: str = GONE
    reading: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.tool


TEMPLATE, SANDBOX = {"template_id": "<template>"}, {"sandbox_id": "<sandbox>"}
FILE = {**SANDBOX, "path": "/workspace/there"}
COMMAND = {**SANDBOX, "command": "true"}
STARTED = {**SANDBOX, "command_id": "<command>"}
BUILD: dict[str, Any] = {"name": "made", "base_template": "debian-12", "recipe": ["true"]}
ROWS = [
    Row("list_base_templates", OK, reading=True),
    Row("create_template", OK, arguments=BUILD),
    Row("create_template", "invalid_request", arguments={**BUILD, "base_template": "<ready>"}),
    Row("list_templates", OK, reading=True),
    Row("find_templates", OK, reading=True, arguments={"package": "curl"}),
    Row("get_template", reading=True, arguments=TEMPLATE),
    Row("get_template_log", reading=True, arguments=TEMPLATE),
    Row("wait_for_template", reading=True, arguments={**TEMPLATE, "timeout_seconds": 1}),
    Row("cancel_template", arguments=TEMPLATE),
    Row("delete_template", arguments=TEMPLATE),
    Row("create_sandbox", arguments={"template": "<ready>"}),
    Row("list_sandboxes", OK, reading=True),
    Row("get_sandbox", reading=True, arguments=SANDBOX),
    Row("exec", arguments=COMMAND),
    Row("exec_background", arguments=COMMAND),
    Row("list_commands", reading=True, arguments=SANDBOX),
    Row("read_command", reading=True, arguments={**STARTED, "wait_seconds": 1}),
    Row("stop_command", arguments=STARTED),
    Row("run_code", arguments={**SANDBOX, "code": "1 + 1"}),
    Row("read_file", reading=True, arguments=FILE),
    Row("write_file", arguments={**FILE, "content": "x"}),
    Row("write_files", arguments={**SANDBOX, "files": [{"path": "/tmp/x", "content": ""}]}),
    Row("edit_file", arguments={**FILE, "old": "x", "new": "y"}),
    Row("get_file_url", reading=True, arguments=FILE),
    Row("get_egress", reading=True, arguments=SANDBOX),
    Row("get_preview_url", reading=True, arguments={**SANDBOX, "port": 3000}),
    Row("list_files", reading=True, arguments=SANDBOX),
    Row("set_sandbox_timeout", arguments={**SANDBOX, "timeout_seconds": 60}),
    Row("pause_sandbox", arguments=SANDBOX),
    Row("resume_sandbox", arguments=SANDBOX),
    Row("terminate_sandbox", arguments=SANDBOX),
    Row("get_sandbox_limits", OK, reading=True),
    Row("create_sandbox", arguments={"snapshot": "<snapshot>"}),
    Row("snapshot_sandbox", arguments=SANDBOX),
    Row("list_snapshots", OK, reading=True),
    Row("list_volumes", OK, reading=True),
    Row("create_sandbox", arguments={"template": "debian-12", "volume": "<volume>"}),
    Row("delete_volume", arguments={"volume_id": "<volume>"}),
    Row("delete_snapshot", arguments={"snapshot_id": "<snapshot>"}),
]


@dataclass
class World:
    """Team Acme with one of everything, and tokens by who holds them."""

    ids: dict[str, str]
    keys: dict[str, str]


@pytest.fixture
def world(plans: None, team: Team, other_team: Team, host: FakeHost) -> World:
    actor = system_actor(team)
    spec = TemplateSpec(name="made", base_template="debian-12", recipe=["true"])
    ready = templates.create_template(actor, spec)
    host.start_build(
        StartBuild(ready.image_id, base_image="debian-12", recipe=["true"], network="restricted")
    )
    type(ready).objects.filter(pk=ready.pk).update(status="ready")
    # With a network, for previews.
    sandbox = sandboxes.create_sandbox(
        actor, SandboxSpec(template="debian-12", network="restricted")
    )
    host.write_file(sandbox.pk, "/workspace/there", b"x")
    snapshot = sandboxes.create_snapshot(actor, sandbox.pk, SnapshotSpec())
    command = sandboxes.start_command(actor, sandbox.pk, BackgroundSpec(command="true"))
    host.frames["true"] = [ExecFrame("started", pid=7), ExecFrame("exited", code=0, duration_ms=1)]
    template = templates.create_template(actor, spec)
    return World(
        ids={
            "<template>": template.pk,
            "<sandbox>": sandbox.pk,
            "<ready>": ready.pk,
            "<snapshot>": snapshot.pk,
            "<command>": command.id,
            "<volume>": sandboxes.create_volume(actor, VolumeSpec(name="data")).pk,
        },
        keys={
            "token": mint_token(team, "Test", [READ, WRITE])[1],
            "read-only": mint_token(team, "Reader", [READ])[1],
            "stranger": mint_token(other_team, "Theirs", [READ, WRITE])[1],
        },
    )


def test_every_tool_is_in_the_table() -> None:
    assert {one.tool for one in ROWS} == {tool.name for tool in TOOLS}


def test_what_is_for_reading_is_said_to_be() -> None:
    hinted = {one.name for one in TOOLS if one.annotations and one.annotations.read_only_hint}
    assert hinted == {one.tool for one in ROWS if one.reading}


@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_everybody_gets_what_they_may_and_no_more(
    world: World, connect: Connect, row: Row
) -> None:
    """The refused first, for they change nothing."""
    arguments = {
        name: world.ids.get(value, value) if isinstance(value, str) else value
        for name, value in row.arguments.items()
    }
    found = {}
    for holder in ("stranger", "read-only", "token"):
        async with connect(world.keys[holder]) as client:
            result = await client.call_tool(row.tool, arguments)
            found[holder] = str(error_of(result)["code"]) if result.is_error else OK
    expected = {"stranger": row.stranger, "read-only": OK if row.reading else NO, "token": OK}
    if row.tool == "resume_sandbox":
        expected["token"] = "sandbox_not_paused"
    assert found == expected


async def test_a_revoked_token_is_out_of_a_session_that_is_open(
    world: World, connect: Connect, team: Team
) -> None:
    from django.utils import timezone

    async with connect(world.keys["token"]) as client:
        assert not (await client.call_tool("list_templates", {})).is_error
        rows = team.tokens.all()
        await database_sync_to_async(rows.update)(revoked_at=timezone.now())
        with pytest.raises(Exception, match="error response"):
            await client.call_tool("list_templates", {})
