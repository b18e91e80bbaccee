"""The tools as an agent meets them."""

from __future__ import annotations

import pytest
from mcp import Client

from tests.mcp.conftest import Connect

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]


async def test_list(connect: Connect, key: str) -> None:
    async with connect(key) as client:
        tools = (await client.list_tools()).tools
        print([t.name for t in tools])
        r = await client.call_tool("list_base_templates", {})
        print(r)
        r = await client.call_tool("create_template", {"name": "x", "base_template": "debian-12", "recipe": ["true"]})
        print(r)
        r = await client.call_tool("create_template", {"name": "x", "base_template": "nope", "recipe": ["true"]})
        print(r)
        r = await client.call_tool("create_template", {"name": "x", "recipe": "oops"})
        print(r)
        r = await client.call_tool("create_template", {"nam": "x"})
        print(r)
        r = await client.call_tool("get_sandbox_limits", {})
        print(r)
    assert 0
