"""A paused sandbox that wakes when a tool uses it."""

from __future__ import annotations

import pytest

from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import done, refused

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]


async def test_a_tool_wakes_what_it_uses(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        options = {"template": "debian-12", "auto_resume": True, "on_timeout": "pause"}
        made = await done(client, "create_sandbox", **options)
        await done(client, "pause_sandbox", sandbox_id=made["id"])
        file = {"path": "/workspace/x", "content": "written"}
        await done(client, "write_file", sandbox_id=made["id"], **file)
        assert host.booted[made["id"]].files["/workspace/x"] == b"written"
        shown = await done(client, "get_sandbox", sandbox_id=made["id"])
        assert shown["status"] == "running"


async def test_without_auto_resume_the_tool_says_what_to_do(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        made = await done(client, "create_sandbox", template="debian-12")
        await done(client, "pause_sandbox", sandbox_id=made["id"])
        told = await refused(client, "list_files", sandbox_id=made["id"], path="/")
        assert "resume it first" in told
