"""A stream that is under way ends when the token it was asked for with no longer holds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.http import HttpRequest
from django.test import RequestFactory

from hostruntime.wire.commands import ExecFrame
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.admission import Admission
from orkestr_console.accounts.models import ApiToken, AuditEntry
from orkestr_console.accounts.services import revoke_token
from orkestr_console.core.errors import RateLimited
from sandboxes_app import api as sandboxes_api
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import ExecSpec, SandboxSpec
from templates_app import api as templates_api
from templates_app import services as templates
from templates_app.models import Template
from templates_app.services import events
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]

CHATTY, SILENT = "chatty", "silent"


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates_api, "TOKEN_RECHECK_SECONDS", 0.1)
    monkeypatch.setattr(events, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(sandboxes_api, "KEEP_ALIVE_SECONDS", 0.1)


@pytest.fixture
def request_of(key: str) -> HttpRequest:
    return RequestFactory().get("/", headers={"Authorization": f"Bearer {key}"})


@pytest.fixture
def building(actor: Actor, host: FakeHost) -> Template:
    spec = TemplateSpec(name="x", base_template="debian-12", recipe=["true"])
    return templates.create_template(actor, spec)


async def endless(template_id: str, after: int = 0) -> AsyncGenerator[list[events.Event]]:
    """A build that is never silent."""
    while True:
        after += 1
        yield [events.Event(after, "output", datetime.now(UTC), {"text": "x"})]
        await asyncio.sleep(0.01)


async def told_until_the_end(parts: Any) -> tuple[list[bytes], list[bytes]]:
    """What came while the token was good, for a while, and what came once it was revoked."""
    before, after = [], []
    until = asyncio.get_running_loop().time() + 0.5
    async with asyncio.timeout(10):
        while asyncio.get_running_loop().time() < until:
            before.append(await anext(parts))
        await sync_to_async(lambda: revoke_token(ApiToken.objects.get()))()
        after = [part async for part in parts]
    layer = get_channel_layer()
    assert layer is not None
    await layer.flush()
    return before, after


def said(part: bytes) -> Any:
    return json.loads(part.partition(b"data: ")[2])


@pytest.mark.parametrize("how", [CHATTY, SILENT])
async def test_the_events_of_a_build(
    request_of: HttpRequest, building: Template, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == CHATTY:
        monkeypatch.setattr(templates, "follow_events", endless)
    parts = templates_api.event_stream(request_of, building.pk, 0)
    before, after = await told_until_the_end(parts)
    assert not any(b"event: error" in part for part in before)
    assert (templates_api.KEEP_ALIVE in before) == (how == SILENT)
    assert after[-1].startswith(b"event: error\ndata: ")
    assert said(after[-1])["code"] == "unauthenticated"
    assert "has been revoked" in said(after[-1])["message"]


@pytest.mark.parametrize("how", [CHATTY, SILENT])
async def test_the_output_of_a_command(
    request_of: HttpRequest,
    actor: Actor,
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    killed = asyncio.Event()

    async def frames(*_: object, **__: object) -> AsyncGenerator[ExecFrame]:
        try:
            while True:
                yield ExecFrame("chunk", stream="stdout", data=b"x")
                await asyncio.sleep(0.01 if how == CHATTY else 3600)
        finally:
            killed.set()

    monkeypatch.setattr(host, "exec_frames", frames)
    create = sync_to_async(sandboxes.create_sandbox)
    box = await create(actor, SandboxSpec(template="debian-12"))
    running = await sync_to_async(sandboxes.exec_stream)(actor, box.pk, ExecSpec(command="make"))
    parts = sandboxes_api.event_stream(request_of, await anext(running), running)
    before, after = await told_until_the_end(parts)
    assert (sandboxes_api.KEEP_ALIVE in before) == (how == SILENT)
    assert said(after[-1])["kind"] == "error"
    assert "has been revoked" in said(after[-1])["message"]
    assert killed.is_set()
    # And not that the client went away, who is still there and reads it.
    entries = AuditEntry.objects.filter(action="sandbox.exec", object_id=box.pk).order_by("id")
    begun, over = [entry.data async for entry in entries]
    assert begun == {"stream": True}
    assert over == {"ended": said(after[-1])["message"]}


async def test_a_token_that_calls_too_often_still_holds(
    request_of: HttpRequest, building: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_often(admission: Admission) -> None:
        raise RateLimited(retry_after=1)

    monkeypatch.setattr(Admission, "require", too_often)
    looked = await sync_to_async(templates_api.access_error)(request_of, building.pk)
    assert looked is None
