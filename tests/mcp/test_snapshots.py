"""Snapshots as an agent takes and uses them."""

from __future__ import annotations

import pytest

from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import done, refused

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]


async def test_take_list_start_from_and_delete(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        source = await done(client, "create_sandbox", template="debian-12", size="medium")
        host.write_file(source["id"], "/workspace/mark", b"before")
        taken = await done(client, "snapshot_sandbox", sandbox_id=source["id"], name="kept")
        assert (taken["status"], taken["name"], taken["size"]) == ("ready", "kept", "medium")
        listed = await done(client, "list_snapshots")
        assert [one["id"] for one in listed["snapshots"]] == [taken["id"]]
        forked = await done(client, "create_sandbox", snapshot=taken["id"])
        assert (forked["cpu"], forked["network"]) == (2.0, "off")
        assert host.booted[forked["id"]].files["/workspace/mark"] == b"before"
        for _ in range(2):
            assert (await done(client, "delete_snapshot", snapshot_id=taken["id"]))["done"]
        assert "not_found" in await refused(client, "create_sandbox", snapshot=taken["id"])
        assert host.taken == {}


async def test_exactly_one_origin_is_wanted(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        for arguments in ({}, {"template": "debian-12", "snapshot": "snap_1"}):
            assert "exactly one" in await refused(client, "create_sandbox", **arguments)
