"""Who may open which socket: every address × every kind of caller, in one table.

``tests/api/test_access_table.py`` is the same for HTTP.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from channels.layers import get_channel_layer
from channels.testing import WebsocketCommunicator
from django.conf import settings
from django.test import Client

from orkestr_console.accounts.models import Role, Team, User
from orkestr_console.asgi import application, websocket_urls
from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.conftest import make_user

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]

type Headers = list[tuple[bytes, bytes]]
type Expected = dict[str, str | int]

# Shown what there is; told to sign in; told that it is not there.
SHOWN, IN, GONE = "shown", 4401, 4404

OF_A_TEAM: Expected = {"other team": SHOWN, "member": SHOWN, "admin": SHOWN}
OF_AN_OBJECT: Expected = {**OF_A_TEAM, "other team": GONE}
SOCKETS: dict[str, Expected] = {
    "ws/templates/": OF_A_TEAM,
    "ws/templates/<str:template_id>/": OF_AN_OBJECT,
    "ws/sandboxes/": OF_A_TEAM,
    "ws/sandboxes/<str:sandbox_id>/": OF_AN_OBJECT,
}
# Cookies alone open a page: without a session nobody does, whatever else they send.
NOBODIES: Expected = {"nobody": IN, "only a token": IN}
CASES = [
    pytest.param(route, caller, expected, id=f"{route} by {caller}")
    for route, callers in SOCKETS.items()
    for caller, expected in {**NOBODIES, **callers}.items()
]


@pytest.fixture
def callers(team: Team, key: str, bob: User, charlie: User, other_team: Team) -> dict[str, Headers]:
    """What each kind of caller sends."""
    dora = make_user("dora", team, Role.ADMIN)
    signed_in = {"member": bob, "admin": dora, "other team": charlie}
    return {
        "nobody": [],
        "only a token": [(b"authorization", f"Bearer {key}".encode())],
        **{name: cookies(user) for name, user in signed_in.items()},
    }


def cookies(user: User) -> Headers:
    client, name = Client(), settings.SESSION_COOKIE_NAME
    client.force_login(user)
    return [(b"cookie", f"{name}={client.cookies[name].value}".encode())]


@asynccontextmanager
async def opened(path: str, headers: Headers) -> AsyncIterator[WebsocketCommunicator]:
    """A socket, opened by a page of ours."""
    ours = [(b"host", b"testserver"), (b"origin", b"http://testserver")]
    socket = WebsocketCommunicator(application, path, headers=[*ours, *headers])
    accepted, _ = await socket.connect(timeout=5)
    assert accepted
    try:
        yield socket
    finally:
        await socket.disconnect()
        layer = get_channel_layer()
        assert layer is not None
        await layer.flush()


async def outcome(socket: WebsocketCommunicator) -> tuple[str | int, str]:
    """What opening it comes to, and everything that was said until then."""
    said = ""
    while (output := await socket.receive_output(timeout=5))["type"] != "websocket.close":
        said += output["text"]
        if json.loads(output["text"])["kind"] != "gone":
            return SHOWN, said
    return int(output["code"]), said


@pytest.mark.parametrize(("route", "caller", "expected"), CASES)
async def test_everybody_hears_what_they_may_and_no_more(
    callers: dict[str, Headers],
    building: Template,
    sandbox: Sandbox,
    route: str,
    caller: str,
    expected: str | int,
) -> None:
    path = route.replace("<str:template_id>", building.pk)
    path = path.replace("<str:sandbox_id>", sandbox.pk)
    async with opened(f"/{path}", callers[caller]) as socket:
        came_to, said = await outcome(socket)
    assert came_to == expected
    # Of the team's objects, those hear who are in it; all others are told nothing of them.
    heard = any(word in said for word in (building.pk, building.name, sandbox.pk))
    assert heard == (caller in {"member", "admin"})
    if expected != SHOWN:
        assert said == ('{"kind": "gone"}' if expected == GONE else "")


@pytest.mark.parametrize("route", [route for route in SOCKETS if "<" in route])
async def test_another_teams_object_is_as_unknown_as_one_that_never_was(
    callers: dict[str, Headers], building: Template, sandbox: Sandbox, route: str
) -> None:
    answers = []
    for template, box in ((building.pk, sandbox.pk), (f"{building.pk[:-4]}ZZZZ", "sbx_ZZZZ")):
        path = route.replace("<str:template_id>", template).replace("<str:sandbox_id>", box)
        async with opened(f"/{path}", callers["other team"]) as socket:
            answers.append(await outcome(socket))
    assert answers[0] == answers[1] == (GONE, '{"kind": "gone"}')


def test_every_socket_is_in_the_table() -> None:
    assert sorted(str(one.pattern) for one in websocket_urls()) == sorted(SOCKETS)
