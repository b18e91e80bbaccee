"""The sockets behind the live pages, over the real notices of PostgreSQL."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.db import OperationalError
from django.test import Client

from orkestr_console.accounts import people, sessions
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Membership, User
from orkestr_console.asgi import application
from orkestr_console.core.channel_layer import LOST, SERVICE_RESTART
from sandboxes_app import services as sandboxes
from sandboxes_app.models import Sandbox
from templates_app import services as templates
from templates_app.consumers import TemplatePage
from templates_app.models import BuildEvent, Template
from templates_app.services import driver
from tests.fakes.host import FakeHost

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]

type Open = Callable[..., Awaitable[WebsocketCommunicator]]


@pytest.fixture
async def opened() -> AsyncIterator[Open]:
    """Opens a socket as a page of the console does; all are closed afterwards."""
    sockets: list[WebsocketCommunicator] = []

    async def make(
        path: str, client: Client | None, origin: str = "http://testserver"
    ) -> WebsocketCommunicator:
        cookie = client.cookies[settings.SESSION_COOKIE_NAME].value if client else ""
        headers = [
            (b"host", b"testserver"),
            (b"origin", origin.encode()),
            (b"cookie", f"{settings.SESSION_COOKIE_NAME}={cookie}".encode()),
        ]
        socket = WebsocketCommunicator(application, path, headers=headers)
        accepted, _ = await socket.connect(timeout=5)
        assert accepted
        sockets.append(socket)
        return socket

    yield make
    for socket in sockets:
        await socket.disconnect()
    layer = get_channel_layer()
    assert layer is not None
    await layer.flush()


async def heard(socket: WebsocketCommunicator) -> dict[str, Any]:
    text, more = "", True
    while more:
        frame = await socket.receive_from(timeout=5)
        assert isinstance(frame, str)
        assert len(frame) < 64 * 1024
        more = frame.startswith("+")
        text += frame.removeprefix("+")
    message: dict[str, Any] = json.loads(text)
    return message


async def swapped(socket: WebsocketCommunicator, *wanted: str) -> str:
    """The next swap that has all of ``wanted`` in it."""
    while True:
        message = await heard(socket)
        if message["kind"] == "swap" and all(text in message["html"] for text in wanted):
            return str(message["html"])


async def closed(socket: WebsocketCommunicator) -> int:
    while (output := await socket.receive_output(timeout=5))["type"] != "websocket.close":
        pass
    return int(output["code"])


async def test_a_template_turns_ready_before_ones_eyes(
    opened: Open, console: Client, building: Template, host: FakeHost
) -> None:
    detail = await opened(f"/ws/templates/{building.pk}/", console)
    listed = await opened("/ws/templates/", console)
    await swapped(detail, 'data-status="building"')
    await swapped(listed, 'data-status="building"')
    driving = asyncio.create_task(sync_to_async(driver.drive)())
    await asyncio.to_thread(host.wait_for, lambda: building.image_id in host.built)
    host.finish(building.image_id)
    html = await swapped(detail, 'id="template-badge"', 'data-status="ready"')
    assert f"/sandboxes/new/?template={building.pk}" in html
    await swapped(listed, 'data-status="ready"')
    await driving


async def test_output_is_neither_lost_nor_repeated(
    opened: Open, console: Client, building: Template, host: FakeHost
) -> None:
    """The page was made after the first half of a line; the socket brings the rest, once."""
    await sync_to_async(building.steps.filter(number=1).update)(status="running")
    await sync_to_async(printed)(building, 2, "one\n\x1b[31mhal")
    page = (await sync_to_async(console.get)(f"/templates/{building.pk}/")).content.decode()
    assert '<span class="tail" data-n="2"><span class="f1">hal</span></span>' in page
    after = re.search(r'data-after="(\d+)"', page)
    assert after
    await sync_to_async(printed)(building, 3, "f\ntwo")
    socket = await opened(f"/ws/templates/{building.pk}/?after={after[1]}", console)
    message = await heard(socket)
    assert message == {
        "kind": "append",
        "seq": 3,
        "steps": [
            {
                "step": 1,
                "lines": '<span data-n="2"><span class="f1">half</span>\n</span>',
                "dropped": 0,
                "tail": '<span class="f1">two</span>',
                "next": 3,
            }
        ],
    }
    again = await opened(f"/ws/templates/{building.pk}/?after=3", console)
    assert (await heard(again))["kind"] == "swap"


def printed(template: Template, seq: int, text: str) -> None:
    BuildEvent.objects.create(
        template=template,
        seq=seq,
        kind="output",
        step=1,
        payload={"text": text},
        at=template.created_at,
    )


async def test_a_deleted_template_says_so(
    opened: Open, console: Client, console_actor: Actor, building: Template
) -> None:
    socket = await opened(f"/ws/templates/{building.pk}/", console)
    await swapped(socket, "data-stack")
    await sync_to_async(templates.delete_template)(console_actor, building.pk)
    while (message := await heard(socket))["kind"] == "swap":
        pass
    assert message == {"kind": "gone"}
    assert await closed(socket) == 4404


async def test_a_sandbox_ends_before_ones_eyes(
    opened: Open, console: Client, console_actor: Actor, sandbox: Sandbox
) -> None:
    detail = await opened(f"/ws/sandboxes/{sandbox.pk}/", console)
    listed = await opened("/ws/sandboxes/?status=running", console)
    await swapped(detail, 'data-status="running"')
    await swapped(listed, sandbox.pk)
    await sync_to_async(sandboxes.terminate_sandbox)(console_actor, sandbox.pk)
    await swapped(detail, 'data-status="terminated"', 'id="run" disabled')
    await swapped(listed, "No sandbox is running right now")


async def test_another_teams_pages_stay_shut(
    opened: Open, other_console: Client, building: Template, sandbox: Sandbox
) -> None:
    for path in (
        f"/ws/templates/{building.pk}/",
        f"/ws/sandboxes/{sandbox.pk}/",
        "/ws/templates/nonsense/",
    ):
        socket = await opened(path, other_console)
        assert await heard(socket) == {"kind": "gone"}
        assert await closed(socket) == 4404
    listed = await opened("/ws/templates/", other_console)
    assert building.pk not in await swapped(listed, "template-list")


async def test_strangers_and_other_sites_hear_nothing(
    opened: Open, console: Client, building: Template
) -> None:
    path = f"/ws/templates/{building.pk}/"
    assert await closed(await opened(path, None)) == 4401
    assert await closed(await opened(path, console, "http://evil.example")) == 4401
    assert await closed(await opened(path, console, "")) == 4401


@pytest.mark.parametrize("how", ["signed out", "left the team"])
async def test_who_may_not_look_any_more_stops_hearing(
    opened: Open,
    console: Client,
    console_actor: Actor,
    building: Template,
    alice: User,
    how: str,
) -> None:
    socket = await opened(f"/ws/templates/{building.pk}/", console)
    await swapped(socket, "data-stack")

    def leave() -> None:
        if how == "signed out":
            console.post("/sign-out/")
        else:
            Membership.objects.filter(user=alice).delete()
        templates.delete_template(console_actor, building.pk)

    await sync_to_async(leave)()
    assert await closed(socket) == 4401


async def test_lost_notices_make_the_page_come_again(
    opened: Open, console: Client, building: Template
) -> None:
    socket = await opened("/ws/templates/", console)
    await swapped(socket, "data-stack")
    layer = get_channel_layer()
    assert layer is not None
    await layer.group_send(f"team.{building.team_id}.templates", dict(LOST))
    assert await closed(socket) == 1012


async def test_a_burst_is_answered_together(
    opened: Open, console: Client, building: Template
) -> None:
    socket = await opened(f"/ws/templates/{building.pk}/", console)
    await swapped(socket, "data-stack")
    layer = get_channel_layer()
    assert layer is not None
    await sync_to_async(printed)(building, 2, "x\n" * 5000)
    for _ in range(50):
        await layer.group_send(f"template.{building.pk}", {"type": "template.changed", "id": "x"})
    message = await heard(socket)
    assert message["kind"] == "append"
    assert message["steps"][0]["dropped"] == 3000
    assert await socket.receive_nothing(timeout=0.5)


async def test_more_than_a_frame_comes_in_several(
    opened: Open, console: Client, building: Template
) -> None:
    """The server sends no message above 64 KiB: a noisy build used to leave the page behind."""
    socket = await opened(f"/ws/templates/{building.pk}/", console)
    await swapped(socket, "data-stack")
    await sync_to_async(printed)(building, 2, f"{'é' * 100}\n" * 1500)
    layer = get_channel_layer()
    assert layer is not None
    await layer.group_send(f"template.{building.pk}", {"type": "template.changed", "id": "x"})
    message = await heard(socket)
    assert message["steps"][0]["lines"].count("é" * 100) == 1500


async def test_very_much_output_shows_its_end_with_its_numbers(
    opened: Open, console: Client, building: Template
) -> None:
    """A page that comes back after long does not have everything drawn that it missed."""
    await sync_to_async(printed)(building, 2, "x" * 99 + "\n")
    await sync_to_async(printed)(building, 3, ("y" * 99 + "\n") * 30_000 + "end")
    socket = await opened(f"/ws/templates/{building.pk}/?after=2", console)
    (step,) = (await heard(socket))["steps"]
    assert step["dropped"] == 28_000
    assert (step["next"], step["tail"]) == (30_002, "end")
    assert re.findall(r'<span data-n="(\d+)">', step["lines"]) == [
        str(n) for n in range(28_002, 30_002)
    ]


async def test_a_page_of_somebody_who_was_removed_closes(
    opened: Open, alice: User, bob: User, building: Template, console_actor: Actor
) -> None:
    member = Client()
    await sync_to_async(member.force_login)(bob)
    socket = await opened(f"/ws/templates/{building.pk}/", member)
    await heard(socket)
    await sync_to_async(people.remove)(console_actor, bob.pk)
    assert await closed(socket) == 4401


async def test_a_page_in_a_session_that_is_ended_elsewhere_closes(
    opened: Open, console: Client, alice: User, building: Template
) -> None:
    await sync_to_async(console.get)("/account/")
    socket = await opened("/ws/templates/", console)
    await heard(socket)
    await sync_to_async(sessions.end_other_sessions)(alice, None)
    assert await closed(socket) == 4401


async def test_while_the_database_is_away_a_page_is_asked_to_come_back(
    opened: Open, console: Client, building: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("the server closed the connection") from psycopg.OperationalError()

    monkeypatch.setattr(TemplatePage, "channel_groups", away)
    page = await opened(f"/ws/templates/{building.pk}/", console)
    assert await closed(page) == SERVICE_RESTART
