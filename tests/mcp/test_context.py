"""What an agent keeps in its context: short lists, names, and how long its sandboxes have left."""

from __future__ import annotations

from typing import Any

import pytest
from channels.db import database_sync_to_async
from django.utils import timezone

from orkestr_console.mcp.schema import MAX_LIST_TOKENS, compact, tokens
from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import TEMPLATE, done, refused

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]

BOX = {"template": "debian-12"}


async def all_pages(client: Any, tool: str, name: str, **arguments: Any) -> list[dict[str, Any]]:
    """The rows of all pages, each of which must fit."""
    found: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await done(client, tool, **arguments, cursor=cursor)
        assert tokens(compact(page)) <= MAX_LIST_TOKENS
        assert page[name]
        found += page[name]
        if (cursor := page["next_cursor"]) is None:
            return found


async def test_live_sandboxes_come_first_and_every_page_fits(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        first = await done(client, "create_sandbox", **BOX, metadata={"x": "y" * 9000, "z": ""})
        row = await database_sync_to_async(Sandbox.objects.get)(pk=first["id"])
        ended = [
            Sandbox(
                **{
                    field.attname: getattr(row, field.attname)
                    for field in Sandbox._meta.concrete_fields
                    if field.name
                    not in {"id", "created_at", "status", "ended_at", "metadata", "error_message"}
                },
                status="failed",
                error_message=f"Lost number {number}.",
                ended_at=timezone.now(),
                metadata={"kind": "w" * 250},
            )
            for number in range(60)
        ]
        await database_sync_to_async(Sandbox.objects.bulk_create)(ended)
        rows = await all_pages(client, "list_sandboxes", "sandboxes", limit=200)
        assert [one["id"] for one in rows] == [first["id"], *(one.pk for one in reversed(ended))]
        assert rows[0]["sandbox"].startswith("running, ends in ")
        assert "get_sandbox" in rows[0]["metadata"]["…"]
        assert rows[1]["sandbox"].endswith("Lost number 59.")
        few = await all_pages(client, "list_sandboxes", "sandboxes", limit=7)
        assert [one["id"] for one in few] == [one["id"] for one in rows]
        running = await done(client, "list_sandboxes", status="running")
        assert [one["id"] for one in running["sandboxes"]] == [first["id"]]
        labelled = await done(client, "list_sandboxes", metadata={"z": ""})
        assert len(labelled["sandboxes"]) == 1


async def test_templates_that_can_be_used_come_before_failed_ones(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        ids = [(await done(client, "create_template", **TEMPLATE))["id"] for _ in "123"]
        newest = Template.objects.filter(pk=ids[2])
        await database_sync_to_async(newest.update)(status="failed")
        rows = await all_pages(client, "list_templates", "templates", limit=1)
        assert [one["id"] for one in rows] == [ids[1], ids[0], ids[2]]
        bases = await done(client, "list_base_templates")
        assert "debian-12" in [base["id"] for base in bases["bases"]]
        host.base_states["code-interpreter"] = "missing"
        host.on_request = {"code-interpreter"}
        [made] = [
            base
            for base in (await done(client, "list_base_templates"))["bases"]
            if base["id"] == "code-interpreter"
        ]
        assert made["state"] == "made when it is first used"


async def test_a_name_stands_for_a_sandbox(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        named = {"metadata": {"name": "dev"}}
        made = await done(client, "create_sandbox", **BOX, **named)
        box = {"sandbox_id": "dev"}
        assert (await done(client, "get_sandbox", **box))["id"] == made["id"]
        await done(client, "write_file", **box, path="/tmp/x", content="y")
        second = await done(client, "create_sandbox", **BOX, **named)
        said = await refused(client, "list_files", **box)
        assert said.startswith("ambiguous: ")
        assert made["id"] in said
        assert second["id"] in said
        for one in (made, second):
            await done(client, "terminate_sandbox", sandbox_id=one["id"])
        # Of those that have ended, the last is meant.
        assert (await done(client, "get_sandbox", **box))["id"] == second["id"]
        assert (await refused(client, "get_sandbox", sandbox_id="prod")).startswith("not_found: ")


async def test_a_name_stands_for_a_template(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        failed = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(Template.objects.update)(status="failed")
        assert (await done(client, "get_template", template_id="tools"))["id"] == failed["id"]
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        assert (await done(client, "get_template", template_id="tools"))["id"] == made["id"]
        box = await done(client, "create_sandbox", template="tools")
        assert box["template"] == made["id"]
        # A base comes before a template of its name.
        other = await done(client, "create_template", **{**TEMPLATE, "name": "debian-12"})
        assert (await done(client, "create_sandbox", **BOX))["template"] == "debian-12"
        derived = await done(client, "create_template", **{**TEMPLATE, "base_template": "tools"})
        assert derived["base_template"] == made["id"]
        assert (await refused(client, "create_sandbox", template="tools")).startswith("ambiguous: ")
        assert "ambiguous" in await refused(client, "delete_template", template_id="tools")
        await done(client, "delete_template", template_id="debian-12")
        said = await refused(client, "get_template", template_id=other["id"])
        assert said.startswith("not_found: ")


async def test_every_answer_says_how_long_a_sandbox_has_left_or_why_it_ended(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        made = await done(client, "create_sandbox", **BOX, timeout_seconds=1000)
        box = {"sandbox_id": made["id"]}
        assert made["sandbox"] in {f"running, ends in {left} s" for left in range(1001)}
        assert "running, ends in" in (await done(client, "list_commands", **box))["sandbox"]
        assert "running, ends in" in (await done(client, "list_files", **box))["sandbox"]
        missing = await refused(client, "read_file", **box, path="/tmp/none")
        assert "\n\nsandbox: running, ends in" in missing
        host.end(made["id"], "expired")
        gone = await refused(client, "list_files", **box)
        assert gone.startswith("sandbox_not_running: ")
        assert ": its time was over" in gone
        assert "sandbox: ended at 20" in gone
        second = await done(client, "create_sandbox", **BOX)
        ended = await done(client, "terminate_sandbox", sandbox_id=second["id"])
        assert ended["sandbox"].endswith(": terminated on request")
        rows = (await done(client, "list_sandboxes"))["sandboxes"]
        assert [one["sandbox"].rpartition(": ")[2] for one in rows] == [
            "terminated on request",
            "its time was over",
        ]


async def test_templates_are_found_by_what_is_in_them(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        made = [await done(client, "create_template", **TEMPLATE) for _ in "12"]
        await database_sync_to_async(run_queue)()
        packages = {"pip": [["Flask_Login", "1.2"], ["x", "1"]], "npm": [["flask-login", "9"]]}
        row = Template.objects.filter(pk=made[0]["id"])
        await database_sync_to_async(row.update)(contents={"packages": packages})
        for name in ("Flask_Login", "flask-login"):
            [found] = (await done(client, "find_templates", package=name))["templates"]
            assert found["id"] == made[0]["id"]
            assert set(found["packages"]) <= {"pip Flask_Login 1.2", "npm flask-login 9"}
        nothing = await done(client, "find_templates", package='" || true')
        assert (nothing["templates"], "create_template" in nothing["hint"]) == ([], True)
        assert "package: " in await refused(client, "find_templates", package=" ")


async def test_an_allowlist_is_for_the_restricted_network_alone(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        listed = {"allow_domains": ["example.org"]}
        for network in ({}, {"network": "off"}, {"network": "open"}):
            said = await refused(client, "create_sandbox", **BOX, **listed, **network)
            assert "applies to network 'restricted' only" in said
        box = await done(client, "create_sandbox", **BOX, **listed, network="restricted")
        taken = await done(client, "snapshot_sandbox", sandbox_id=box["id"])
        await done(client, "create_sandbox", snapshot=taken["id"], **listed)
        egress = await done(client, "get_egress", sandbox_id=box["id"])
        assert (egress["network"], egress["allow_domains"]) == ("restricted", ["example.org"])
        box = await done(client, "create_sandbox", **BOX)
        taken = await done(client, "snapshot_sandbox", sandbox_id=box["id"])
        said = await refused(client, "create_sandbox", snapshot=taken["id"], **listed)
        assert "the snapshot's is 'off'" in said


async def test_use_is_beside_each_limit(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        await done(client, "create_sandbox", **BOX)
        limits = await done(client, "get_sandbox_limits")
        assert limits["use"]["running_sandboxes"]["used"] == 1
        assert all(one["max"] >= (one["used"] or 0) for one in limits["use"].values())
        assert limits["sizes"][0] == "small: 1 vCPU, 1024 MB"
