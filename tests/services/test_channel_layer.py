"""Notices between processes, on a real PostgreSQL, its restarts and slow readers included."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import get_channel_layer
from channels.testing import WebsocketCommunicator
from django.db import transaction

from orkestr_console.core.channel_layer import (
    MAX_BUFFERED,
    NOTICES,
    PgChannelLayer,
    ReconnectsOnLoss,
    notify,
)
from orkestr_console.core.postgres import connection_arguments

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
async def layer() -> AsyncIterator[PgChannelLayer]:
    layer = get_channel_layer()
    assert isinstance(layer, PgChannelLayer)
    yield layer
    await layer.flush()


async def heard(layer: PgChannelLayer, channel: str) -> dict[str, Any]:
    return await asyncio.wait_for(layer.receive(channel), 5)


async def joined(layer: PgChannelLayer, group: str) -> str:
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    return channel


async def send_from_another_process(group: str, **message: Any) -> None:
    payload = json.dumps({"group": group, "message": message})
    async with await psycopg.AsyncConnection.connect(**connection_arguments("test")) as other:
        await other.execute("SELECT pg_notify(%s, %s)", [NOTICES, payload])


async def test_a_group_hears_what_another_process_sends(layer: PgChannelLayer) -> None:
    first, second = await joined(layer, "build.1"), await joined(layer, "build.1")
    stranger = await joined(layer, "build.2")
    await send_from_another_process("build.1", type="x", seq=1)
    await send_from_another_process("build.2", type="x", seq=2)
    assert (await heard(layer, first))["seq"] == 1
    assert (await heard(layer, second))["seq"] == 1
    assert (await heard(layer, stranger))["seq"] == 2


async def test_a_notice_leaves_on_commit_and_not_before(layer: PgChannelLayer) -> None:
    channel = await joined(layer, "g")

    def send_in_transactions() -> None:
        with transaction.atomic():
            notify("g", {"type": "x", "n": 1})
            transaction.set_rollback(True)
        with transaction.atomic():
            notify("g", {"type": "x", "n": 2})
            time.sleep(0.1)
            assert mailbox.empty()

    mailbox = layer._hub().mailboxes[channel]
    await sync_to_async(send_in_transactions)()
    assert (await heard(layer, channel))["n"] == 2


async def test_a_channel_that_left_its_group_hears_nothing_more(layer: PgChannelLayer) -> None:
    channel = await joined(layer, "g")
    await layer.group_discard("g", channel)
    await layer.group_send("g", {"type": "x", "n": 1})
    await layer.send(channel, {"type": "y"})
    assert (await heard(layer, channel))["type"] == "y"


async def test_a_lost_connection_is_said_and_listening_goes_on(layer: PgChannelLayer) -> None:
    channel = await joined(layer, "g")
    async with await psycopg.AsyncConnection.connect(**connection_arguments("test")) as other:
        cursor = await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'orkestr notices' AND datname = current_database()"
        )
        assert await cursor.fetchall() == [(True,)]
    assert (await heard(layer, channel))["type"] == "layer.lost"
    await layer.group_send("g", {"type": "x"})
    assert (await heard(layer, channel))["type"] == "x"


async def test_a_slow_reader_loses_its_buffer_and_is_told(layer: PgChannelLayer) -> None:
    slow, quick = await joined(layer, "slow"), await joined(layer, "quick")

    def flood() -> None:
        with transaction.atomic():
            for number in range(MAX_BUFFERED + 5):
                notify("slow", {"type": "x", "n": number})
            notify("quick", {"type": "done"})

    await sync_to_async(flood)()
    await heard(layer, quick)
    assert (await heard(layer, slow))["type"] == "layer.lost"
    await layer.group_send("slow", {"type": "after"})
    assert (await heard(layer, slow))["type"] == "after"


async def test_a_reader_that_ends_leaves_nothing_behind(layer: PgChannelLayer) -> None:
    channel = await joined(layer, "g")
    reading = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert layer._hub().members("g") == []
    assert layer._hub().mailboxes == {}


async def test_a_notice_that_is_no_pointer_is_refused(layer: PgChannelLayer) -> None:
    with pytest.raises(ValueError, match="ids, not data"):
        await layer.group_send("g", {"type": "x", "text": "é" * 4000})


async def test_a_group_name_that_channels_forbids_is_refused(layer: PgChannelLayer) -> None:
    with pytest.raises(TypeError, match="Group name"):
        await layer.group_send("team:1", {"type": "x"})


class Page(ReconnectsOnLoss, AsyncWebsocketConsumer):
    def __init__(self) -> None:
        super().__init__()
        self.groups = ["page"]

    async def note(self, event: dict[str, Any]) -> None:
        await self.send(text_data=str(event["n"]))


async def test_a_socket_is_closed_with_1012_when_notices_were_lost(layer: PgChannelLayer) -> None:
    page = WebsocketCommunicator(Page.as_asgi(), "/")
    connected, _ = await page.connect()
    assert connected
    await layer.group_send("page", {"type": "note", "n": 7})
    assert await page.receive_from(timeout=5) == "7"
    await layer.group_send("page", {"type": "layer.lost"})
    assert await page.receive_output(timeout=5) == {"type": "websocket.close", "code": 1012}
    await page.wait()
