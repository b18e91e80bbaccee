"""The MCP server over ASGI, with the SDK's own client and a host in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx2
import pytest
from channels.layers import get_channel_layer
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from orkestr_console.asgi import application
from orkestr_console.core.addresses import MCP_PATH
from tests.fakes.fixtures import host as host
from tests.fakes.fixtures import plans as plans

URL = f"http://testserver{MCP_PATH}"

type Connect = Callable[..., AbstractAsyncContextManager[Client]]


def http_client(key: str | None, **headers: str) -> httpx2.AsyncClient:
    """An HTTP client that calls the application with no network between."""
    given = {"Authorization": f"Bearer {key}"} if key else {}
    # Both are ASGI, but say it with types of their own.
    app: Any = application
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), headers={**given, **headers})


@pytest.fixture
async def connect(plans: None) -> AsyncIterator[Connect]:
    """Opens a session as an agent does: ``async with connect(key) as client``."""

    @asynccontextmanager
    async def opening(key: str | None, **options: Any) -> AsyncIterator[Client]:
        async with (
            http_client(key) as http,
            Client(streamable_http_client(URL, http_client=http), **options) as client,
        ):
            yield client

    yield opening
    from orkestr_console.mcp import endpoint

    await endpoint.close()
    layer = get_channel_layer()
    assert layer is not None
    await layer.flush()
