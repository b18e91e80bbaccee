"""Who may do what, everywhere: every address × every kind of caller, in one table.

An address that is not in the table fails the first test, so whoever adds one decides here. The
sockets have a table of their own: ``tests/console/test_socket_access.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from django.contrib.sessions.models import Session
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver

from orkestr_console.accounts import device_login, people, sessions
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.device_login import DeviceStartSpec
from orkestr_console.accounts.models import Membership, Role, SignedIn, Team, User
from orkestr_console.accounts.people import InviteSpec
from orkestr_console.accounts.services import mint_token
from orkestr_console.webhooks import services as webhooks
from orkestr_console.webhooks.specs import WebhookSpec
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import (
    BackgroundSpec,
    ContextSpec,
    PresignSpec,
    SandboxSpec,
    SnapshotSpec,
    VolumeSpec,
)
from templates_app import services as templates
from templates_app.specs import TemplateSpec
from tests.conftest import api_client, make_user
from tests.fakes.host import FakeHost
from tests.receiving import loopback_permitted as loopback_permitted

# Answers: done or shown, sign in first, no token, may not, is not there.
OK, IN, BARE, NO, GONE = "ok", "sign in", 401, 403, 404

type Expected = str | int


@dataclass(frozen=True)
class Row:
    """One call: ``<…>`` in the route is replaced by the id of a thing of team Acme."""

    method: str
    route: str
    expected: dict[str, Expected]
    form: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method} {self.route}"


def rest(method: str, route: str, other: Expected, own: Expected = OK, **body: Any) -> Row:
    """A REST call: reading needs the read scope, everything else the write scope."""
    read = own if method == "GET" else NO
    callers = {"nobody": BARE, "session": BARE, "read-only": read, "token": own, "other": other}
    return Row(method, f"v1/{route}", callers, body)


def account(
    method: str, route: str, *, read: Expected = OK, own: Expected = OK, **body: Any
) -> Row:
    """A call about the token itself, whichever it is; another team's has tokens of its own."""
    callers = {"nobody": BARE, "session": BARE, "read-only": read, "token": own, "other": own}
    return Row(method, f"api/{route}", callers, body)


def open_call(route: str, expected: Expected, **body: Any) -> Row:
    """What a program calls that has no token yet: whoever calls, the answer is the same."""
    callers = ("nobody", "session", "read-only", "token", "other")
    return Row("POST", f"api/{route}", dict.fromkeys(callers, expected), body)


def reading(method: str, route: str, other: Expected, **body: Any) -> Row:
    """A REST call that needs only the read scope, whatever its method."""
    row = rest(method, route, other, **body)
    return Row(row.method, row.route, {**row.expected, "read-only": OK}, body)


def signed(method: str, route: str, **body: Any) -> Row:
    """A call that the address itself allows, to whoever has it."""
    everybody: dict[str, Expected] = dict.fromkeys(
        ("nobody", "session", "read-only", "token", "other"), OK
    )
    return Row(method, f"v1/{route}", everybody, body)


def public(route: str) -> Row:
    """What says nothing of anybody."""
    callers = ("nobody", "session", "read-only", "token", "other")
    return Row("GET", f"v1/{route}", dict.fromkeys(callers, OK))


def page(
    method: str,
    route: str,
    *,
    member: Expected = OK,
    admin: Expected = OK,
    owner: Expected = OK,
    other: Expected = OK,
    nobody: Expected = IN,
    **form: Any,
) -> Row:
    """A console page; a Bearer token is no session."""
    people = {"member": member, "admin": admin, "owner": owner, "other owner": other}
    return Row(method, route, {"nobody": nobody, "only a token": nobody, **people}, form)


TEMPLATE, SANDBOX = "templates/<template>", "sandboxes/<sandbox>"
BUILD: dict[str, Any] = {"name": "made", "base_template": "debian-12", "recipe": ["true"]}
BOX = {"template": "debian-12", "size": "small", "network": "off", "timeout_seconds": "60"}
FORK = {"network": "off", "timeout_seconds": "60"}
FILE = {"path": "/workspace/x", "content": "eA=="}

REST = [
    rest("GET", "bases", OK),
    rest("GET", "templates", OK),
    rest("POST", "templates", OK, **BUILD),
    rest("GET", TEMPLATE, GONE),
    rest("DELETE", TEMPLATE, GONE),
    rest("POST", f"{TEMPLATE}/cancel", GONE),
    rest("GET", f"{TEMPLATE}/events", GONE),
    rest("GET", f"{TEMPLATE}/events?follow=true", GONE),
    rest("GET", f"{TEMPLATE}/log", GONE),
    rest("GET", f"{TEMPLATE}/contents", GONE, 409),
    rest("GET", f"{TEMPLATE}/usage", GONE),
    rest("GET", "sandboxes", OK),
    rest("POST", "sandboxes", OK, template="debian-12"),
    rest("POST", "sandboxes", GONE, 409, template="<template>"),
    rest("GET", "sandboxes/limits", OK),
    rest("POST", "sandboxes", GONE, snapshot="<snapshot>"),
    rest("GET", "sandboxes/snapshots", OK),
    rest("GET", "sandboxes/snapshots/<snapshot>", GONE),
    rest("DELETE", "sandboxes/snapshots/<snapshot>", GONE),
    rest("POST", f"{SANDBOX}/snapshots", GONE, name="kept"),
    rest("GET", "sandboxes/volumes", OK),
    rest("POST", "sandboxes/volumes", OK, name="made"),
    rest("GET", "sandboxes/volumes/<volume>", GONE),
    rest("PATCH", "sandboxes/volumes/<volume>", GONE, max_lifetime_days=1),
    rest("POST", "sandboxes/volumes/<volume>/move", GONE, region="local"),
    rest("DELETE", "sandboxes/volumes/<volume>", GONE),
    rest("POST", "sandboxes", GONE, template="debian-12", volume="<volume>"),
    rest("GET", "sandboxes/webhooks", OK),
    rest("POST", "sandboxes/webhooks", OK, url="http://127.0.0.1:9/"),
    rest("GET", "sandboxes/webhooks/<webhook>", GONE),
    rest("DELETE", "sandboxes/webhooks/<webhook>", GONE),
    rest("POST", "sandboxes/webhooks/<webhook>/enable", GONE),
    rest("POST", "sandboxes/webhooks/<webhook>/test", GONE),
    rest("GET", "sandboxes/webhooks/<webhook>/deliveries", GONE),
    rest("GET", SANDBOX, GONE),
    rest("DELETE", SANDBOX, GONE),
    rest("POST", f"{SANDBOX}/timeout", GONE, timeout_seconds=60),
    rest("POST", f"{SANDBOX}/pause", GONE),
    rest("POST", f"{SANDBOX}/resume", GONE, 409),
    rest("POST", f"{SANDBOX}/exec", GONE, command="true"),
    rest("POST", f"{SANDBOX}/commands", GONE, command="true"),
    rest("GET", f"{SANDBOX}/commands", GONE),
    rest("GET", f"{SANDBOX}/commands/<command>", GONE),
    rest("GET", f"{SANDBOX}/commands/<command>/logs", GONE),
    rest("GET", f"{SANDBOX}/commands/<command>/logs?follow=true", GONE),
    rest("DELETE", f"{SANDBOX}/commands/<command>", GONE),
    rest("POST", f"{SANDBOX}/code", GONE, code="1 + 1"),
    rest("POST", f"{SANDBOX}/code/contexts", GONE),
    rest("GET", f"{SANDBOX}/code/contexts", GONE),
    rest("POST", f"{SANDBOX}/code/contexts/<context>/restart", GONE),
    rest("DELETE", f"{SANDBOX}/code/contexts/<context>", GONE),
    rest("GET", f"{SANDBOX}/egress", GONE),
    rest("GET", f"{SANDBOX}/metrics", GONE),
    rest("GET", f"{SANDBOX}/host?port=3000", GONE, 409),
    rest("GET", f"{SANDBOX}/files?path=/workspace/there", GONE),
    rest("POST", f"{SANDBOX}/files", GONE, **FILE),
    rest("DELETE", f"{SANDBOX}/files?path=/workspace/there", GONE),
    rest("POST", f"{SANDBOX}/files/mkdir", GONE, path="/workspace/d"),
    rest("POST", f"{SANDBOX}/files/move", GONE, source="/workspace/there", destination="/tmp/y"),
    rest("GET", f"{SANDBOX}/files/stat?path=/workspace/there", GONE),
    rest("POST", f"{SANDBOX}/files/batch", GONE, files=[FILE]),
    rest("POST", f"{SANDBOX}/files/presign-upload", GONE, path="/workspace/x"),
    reading("POST", f"{SANDBOX}/files/presign-download", GONE, path="/workspace/there"),
    signed("GET", "transfers/<download>"),
    signed("PUT", "transfers/<upload>", any="thing"),
    public("openapi.json"),
]
ACCOUNT = [
    account("GET", "auth/me"),
    account("GET", "v1/api-tokens"),
    account("POST", "v1/api-tokens", read=NO, name="made"),
    # A token sees those of its own person only; these have none.
    account("DELETE", "v1/api-tokens/<lookup>", read=GONE, own=GONE),
    account("DELETE", "api-tokens/current"),
    open_call("auth/device/start", OK, client_name="a program"),
    open_call("auth/device/token", 400, device_code="unknown"),
]
ADMINS = {"member": NO}
OPERATORS = {"member": GONE, "admin": GONE, "owner": GONE, "other": GONE}
OPEN = {"nobody": OK}
THEIRS = {"other": GONE}
# It is still building: there is no image yet.
NO_IMAGE = {"member": 409, "admin": 409, "owner": 409}
CONSOLE = [
    page("GET", "", **OPEN),
    page("GET", "sign-in/", **OPEN),
    page("POST", "sign-in/", nobody=400, email="x@example.org", password="wrong"),
    page("GET", "sign-in/code/", member=IN, admin=IN, owner=IN, other=IN),
    page("POST", "sign-out/", member=IN, admin=IN, owner=IN, other=IN),
    page("GET", "join/<secret>/", **OPEN),
    page("POST", "join/<secret>/", member=409, admin=409, owner=409, nobody=400),
    page("GET", "templates/"),
    page("GET", "templates/new/"),
    page("POST", "templates/new/", **{**BUILD, "recipe": "true", "network": "restricted"}),
    page("GET", "templates/<template>/", **THEIRS),
    page("GET", "templates/<template>/delete/", **THEIRS),
    page("POST", "templates/<template>/delete/", **THEIRS),
    page("GET", "templates/<template>/cancel/", **THEIRS),
    page("POST", "templates/<template>/cancel/", **THEIRS),
    page("POST", "templates/<template>/again/", **THEIRS, reuse="failed"),
    page("GET", "templates/<template>/log/", **THEIRS),
    page("GET", "templates/<template>/search/?q=x", **THEIRS),
    page("GET", "templates/<template>/contents/", **NO_IMAGE, **THEIRS),
    page("GET", "templates/compare/"),
    page("GET", "templates/compare/?a=<template>&b=<template>", **NO_IMAGE, **THEIRS),
    page("GET", "templates/<template>/steps/1/output/", **THEIRS),
    page("GET", "templates/<template>/steps/1/lines/?first=1&last=1&at=1", **THEIRS),
    page("GET", "sandboxes/"),
    page("GET", "sandboxes/new/"),
    page("GET", "sandboxes/of-template/<template>/", **THEIRS),
    page("POST", "sandboxes/new/", **BOX),
    page("GET", "sandboxes/snapshots/"),
    page("GET", "sandboxes/snapshots/<snapshot>/", **THEIRS),
    page("POST", "sandboxes/snapshots/<snapshot>/start/", **THEIRS, **FORK),
    page("GET", "sandboxes/snapshots/<snapshot>/delete/", **THEIRS),
    page("POST", "sandboxes/snapshots/<snapshot>/delete/", **THEIRS),
    page("GET", "sandboxes/volumes/"),
    page("GET", "sandboxes/volumes/<volume>/delete/", **THEIRS),
    page("POST", "sandboxes/volumes/<volume>/delete/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/exec/", **THEIRS, command="true", timeout_seconds="5"),
    page("GET", "sandboxes/<sandbox>/commands/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/commands/<command>/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/commands/<command>/output/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/commands/<command>/stop/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/egress/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/preview/", **THEIRS),
    page("GET", "sandboxes/<sandbox>/use/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/pause/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/resume/", member=409, admin=409, owner=409, **THEIRS),
    page("GET", "sandboxes/<sandbox>/snapshot/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/snapshot/", **THEIRS, name="kept"),
    page("GET", "sandboxes/<sandbox>/terminate/", **THEIRS),
    page("POST", "sandboxes/<sandbox>/terminate/", **THEIRS),
    page("GET", "teams/"),
    page("POST", "team/switch/", **THEIRS, team="<team>"),
    page("GET", "team/people/"),
    page("POST", "team/people/", **ADMINS, role="member", email=""),
    page("GET", "team/people/<bob>/", **ADMINS, **THEIRS),
    page("POST", "team/people/<bob>/", **ADMINS, **THEIRS, role="admin"),
    page("POST", "team/people/<bob>/", member=NO, admin=NO, **THEIRS, role="owner"),
    page("GET", "team/people/<alice>/remove/", **ADMINS, **THEIRS),
    page("POST", "team/people/<alice>/remove/", member=NO, admin=NO, owner=409, **THEIRS),
    page("POST", "team/people/<dora>/remove/", **ADMINS, **THEIRS),
    page("POST", "team/invitations/<invitation>/revoke/", **ADMINS, **THEIRS),
    page("GET", "team/limits/"),
    page("POST", "team/limits/", **ADMINS, sizes=["small"], networks=["off"], bases=["debian-12"]),
    page("GET", "team/tokens/", **ADMINS),
    page("POST", "team/tokens/", **ADMINS, name="made", scopes=[READ]),
    page("POST", "team/tokens/<token>/revoke/", **ADMINS, **THEIRS),
    page("GET", "team/webhooks/"),
    page("POST", "team/webhooks/", url="http://127.0.0.1:9/", which="all"),
    page("GET", "team/webhooks/<webhook>/", **THEIRS),
    page("GET", "team/webhooks/<webhook>/deliveries/", **THEIRS),
    page("POST", "team/webhooks/<webhook>/test/", **THEIRS),
    page("POST", "team/webhooks/<webhook>/enable/", **THEIRS),
    page("GET", "team/webhooks/<webhook>/delete/", **THEIRS),
    page("POST", "team/webhooks/<webhook>/delete/", **THEIRS),
    page("GET", "team/audit/", **ADMINS),
    page("GET", "team/audit/csv/", **ADMINS),
    page("GET", "team/audit/jsonl/", **ADMINS),
    page("GET", "team/usage/"),
    page("GET", "team/usage/csv/"),
    page("GET", "device/"),
    page("GET", "device/?code=<code>"),
    page("POST", "device/", **ADMINS, answer="approve", code="<code>"),
    page("POST", "device/", answer="deny", code="<code>"),
    page("GET", "reference/"),
    page("GET", "reference/sandboxes/"),
    page("GET", "connect/"),
    page("POST", "connect/", **ADMINS, name="made", access="read"),
    page("GET", "account/"),
    page("POST", "account/name/", name="Me"),
    page("POST", "account/password/", member=400, admin=400, owner=400, other=400, current="?"),
    page("POST", "account/sessions/<session>/end/", member=GONE, admin=GONE, other=GONE),
    page("POST", "account/sessions/end-others/"),
    page("POST", "account/code/begin/"),
    page("POST", "account/code/confirm/", member=400, admin=400, owner=400, other=400, code="1"),
    page("POST", "account/code/off/", member=400, admin=400, owner=400, other=400, current="?"),
    page("GET", "operator/", **OPERATORS),
    page("GET", "operator/teams/new/", **OPERATORS),
    page("POST", "operator/teams/new/", **OPERATORS, name="Made", plan="enterprise"),
    page("GET", "operator/teams/<team>/", **OPERATORS),
    page("POST", "operator/teams/<team>/", **OPERATORS, plan="enterprise"),
    page("GET", "operator/plans/pro/", **OPERATORS),
    page("POST", "operator/plans/pro/", **OPERATORS, name="Pro"),
    page("GET", "operator/storage/", **OPERATORS),
    page("GET", "operator/storage/accept/", **OPERATORS),
    page("POST", "operator/storage/accept/", **OPERATORS),
    page("POST", "operator/storage/image.img_one/restore/", **OPERATORS),
    page("GET", "operator/storage/image.img_one/delete/", **OPERATORS),
    page("POST", "operator/storage/image.img_one/delete/", **OPERATORS),
]
# For everybody, and telling nothing: health, and what answers an unknown address.
PUBLIC = {"healthz", "readyz", r"^v1(?:/.*)?$", r"^api(?:/.*)?$"}


class Callers(dict[str, Client]):
    """Who calls, by name: each signs in as it first does."""

    def __init__(self, arriving: Mapping[str, Callable[[], Client]]) -> None:
        super().__init__()
        self._arriving = arriving

    def __missing__(self, name: str) -> Client:
        self[name] = self._arriving[name]()
        return self[name]


@dataclass
class World:
    """Team Acme with one of everything, and who calls."""

    ids: dict[str, str]
    clients: Callers


@pytest.fixture
def world(
    team: Team, alice: User, bob: User, charlie: User, host: FakeHost, loopback_permitted: None
) -> World:
    dora = make_user("dora", team, Role.ADMIN)
    alices = Actor(team, alice, None, "console", None, frozenset({"*"}), Role.OWNER)
    spec = TemplateSpec(name="made", base_template="debian-12", recipe=["true"])
    template = templates.create_template(alices, spec)
    sandbox = sandboxes.create_sandbox(alices, SandboxSpec(template="debian-12"))
    host.write_file(sandbox.pk, "/workspace/there", b"x")
    snapshot = sandboxes.create_snapshot(alices, sandbox.pk, SnapshotSpec())
    command = sandboxes.start_command(alices, sandbox.pk, BackgroundSpec(command="true"))
    host.end_command(command.id)
    webhook, _ = webhooks.create_webhook(alices, WebhookSpec(url="http://127.0.0.1:9/"))
    volume = sandboxes.create_volume(alices, VolumeSpec(name="data"))
    token, text = mint_token(team, "Test", [READ, WRITE])
    tokens = Actor(team, None, token, "rest", None, frozenset({WRITE}))
    there = PresignSpec(path="/workspace/there")
    reader = mint_token(team, "Reader", [READ])[1]
    invitation, secret = people.invite(alices, InviteSpec())
    started = device_login.start(DeviceStartSpec(client_name="a program"), "192.0.2.1")
    others = mint_token(Team.objects.get(slug="globex"), "Theirs", [READ, WRITE])[1]
    signed_in = SignedIn.objects.create(user=alice, session_key="k" * 32)
    Session.objects.create(session_key="k" * 32, expire_date=sandbox.expires_at)
    people_of = {"member": bob, "admin": dora, "owner": alice, "other owner": charlie}
    named = {user.get_full_name().lower(): str(user.pk) for user in people_of.values()}
    return World(
        ids={
            **named,
            "template": template.pk,
            "sandbox": sandbox.pk,
            "snapshot": snapshot.pk,
            "command": command.id,
            "context": sandboxes.create_context(alices, sandbox.pk, ContextSpec()).id,
            "webhook": webhook.pk,
            "volume": volume.pk,
            "token": token.pk,
            "lookup": mint_token(team, "Alice's", [READ], created_by=alice)[0].lookup,
            "code": started.user_code,
            "download": sandboxes.presign_download(tokens, sandbox.pk, there).signed(),
            "upload": sandboxes.presign_upload(tokens, sandbox.pk, there).signed(),
            "invitation": invitation.pk,
            "secret": secret,
            "session": str(signed_in.pk),
            "team": team.pk,
        },
        clients=Callers(
            {
                "nobody": lambda: api_client(None),
                "session": lambda: console_of(alice),
                "read-only": lambda: api_client(reader),
                "token": lambda: api_client(text),
                "only a token": lambda: Client(headers={"Authorization": f"Bearer {text}"}),
                "other": lambda: api_client(others),
                **{name: partial(console_of, user) for name, user in people_of.items()},
            }
        ),
    )


def console_of(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def filled(value: Any, ids: dict[str, str]) -> Any:
    """A route or body with the ids put in."""
    if isinstance(value, str):
        return re.sub(r"<(\w+)>", lambda match: ids[match[1]], value)
    if isinstance(value, dict):
        return {name: filled(one, ids) for name, one in value.items()}
    return value


def answer_of(row: Row, world: World, caller: str) -> Any:
    client, address = world.clients[caller], f"/{filled(row.route, world.ids)}"
    body = filled(row.form, world.ids)
    if row.method == "GET":
        return client.get(address)
    if row.route.startswith(("v1/", "api/")):
        call: Callable[..., Any] = getattr(client, row.method.lower())
        return call(address, body, content_type="application/json")
    client.handler.enforce_csrf_checks = False
    return client.post(address, body)


def summary(answer: Any) -> Expected:
    """What the answer comes to."""
    if answer.status_code == 302 and answer["Location"].partition("?")[0] == "/sign-in/":
        return IN
    return OK if answer.status_code < 400 else int(answer.status_code)


def groups(row: Row) -> Iterator[tuple[str, ...]]:
    """The callers that can share one world: what is read, and what is refused, changes nothing."""
    if row.method == "GET":
        yield tuple(row.expected)
        return
    yield tuple(caller for caller, expected in row.expected.items() if expected != OK)
    yield from ((caller,) for caller, expected in row.expected.items() if expected == OK)


CASES = [
    pytest.param(row, callers, id=f"{row} by {', '.join(callers)}")
    for row in (*REST, *ACCOUNT, *CONSOLE)
    for callers in groups(row)
    if callers
]


@pytest.mark.parametrize(("row", "callers"), CASES)
def test_everybody_gets_what_they_may_and_no_more(
    world: World, row: Row, callers: tuple[str, ...]
) -> None:
    answers = {caller: answer_of(row, world, caller) for caller in callers}
    assert {caller: summary(answer) for caller, answer in answers.items()} == {
        caller: row.expected[caller] for caller in callers
    }


@pytest.mark.parametrize(
    "row", [row for row in (*REST, *ACCOUNT, *CONSOLE) if GONE in row.expected.values()]
)
def test_another_teams_object_is_as_unknown_as_one_that_never_was(world: World, row: Row) -> None:
    strangers = [caller for caller in ("other", "other owner") if row.expected.get(caller) == GONE]
    for stranger in strangers:
        foreign = answer_of(row, world, stranger)
        missing = answer_of(row, World(absent(world.ids), world.clients), stranger)
        assert foreign.status_code == missing.status_code == GONE
        assert told(foreign) == told(missing)


def absent(ids: dict[str, str]) -> dict[str, str]:
    """Ids of the same form that nothing has."""
    return {
        name: "999999" if value.isdigit() else f"{value[:-4]}ZZZZ" for name, value in ids.items()
    }


def told(answer: Any) -> str:
    """The answer without its request id and the page's one-time values."""
    text = answer.content.decode()
    text = re.sub(r"req_\w+|tmpl_\w+|sbx_\w+|snap_\w+|vol_\w+|whk_\w+|nonce=\S+", "", text)
    return re.sub(r'name="csrfmiddlewaretoken" value="\w+"', "", text)


def routes(patterns: Any, prefix: str = "") -> Iterator[str]:
    """Every address there is, with its parameters as ``<>``."""
    for one in patterns:
        here = f"{prefix}{one.pattern}"
        if isinstance(one, URLResolver):
            yield from routes(one.url_patterns, here)
        elif isinstance(one, URLPattern):
            yield re.sub(r"<[^>]*>", "<>", here)


def test_every_address_is_in_the_table() -> None:
    known = [
        re.compile(re.escape(r).replace("<>", "[^/]+"))
        for r in routes(get_resolver().url_patterns)
        if r not in PUBLIC
    ]
    listed = {row.route.partition("?")[0] for row in (*REST, *ACCOUNT, *CONSOLE)}
    missing = [one.pattern for one in known if not any(one.fullmatch(row) for row in listed)]
    strange = [row for row in listed if not any(one.fullmatch(row) for one in known)]
    assert (missing, strange) == ([], [])


def test_a_person_who_was_removed_is_out_at_once(
    world: World, team: Team, alice: User, bob: User
) -> None:
    member = world.clients["member"]
    assert member.get("/templates/").status_code == 200
    alices = Actor(team, alice, None, "console", None, frozenset({"*"}), Role.OWNER)
    people.remove(alices, bob.pk)
    assert member.get("/templates/").status_code == 403
    assert not Membership.objects.filter(user=bob).exists()


def test_an_ended_session_is_out_at_once(world: World, alice: User) -> None:
    owner = world.clients["owner"]
    owner.get("/account/")
    sessions.end_other_sessions(alice, keep_session=None)
    assert summary(owner.get("/templates/")) == IN
