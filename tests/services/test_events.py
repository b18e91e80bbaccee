"""Following a build's events: whoever leaves and comes back has neither gap nor repeat."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from channels.layers import get_channel_layer
from django.db import OperationalError
from django.test import RequestFactory

from orkestr_console.accounts.actor import system_actor
from orkestr_console.accounts.models import Team
from templates_app import api as templates_api
from templates_app import presenters, services
from templates_app.answers import BuildEvent
from templates_app.events import notify_progress
from templates_app.models import Template
from templates_app.services import events
from templates_app.services.record import append_event
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


@pytest.fixture
async def building(host: FakeHost) -> AsyncIterator[str]:
    """A template that builds; what is told of it, the test tells."""

    def make() -> str:
        team = Team.objects.create(name="Acme", slug="acme", plan_id="team")
        spec = TemplateSpec(name="x", base_template="debian-12", recipe=["true"])
        return services.create_template(system_actor(team), spec).pk

    yield await sync_to_async(make)()
    layer = get_channel_layer()
    assert layer is not None
    await layer.flush()


def say(template_id: str, *texts: str) -> None:
    """Tell some output, as a driver does."""
    template = Template.objects.get(pk=template_id)
    for text in texts:
        append_event(template, "output", {"step": 1, "text": text})
    notify_progress(template_id)


async def test_what_was_sent_is_kept_no_longer_than_what_it_was_made_of(building: str) -> None:
    """A long log that is read again and again leaves nothing in the web process."""
    text, count = "x" * 32_000, 600
    await sync_to_async(say)(building, *[f"{number}{text}" for number in range(count)])
    await sync_to_async(finish)(building)
    request = RequestFactory().get("/")

    async def read() -> int:
        parts = [len(part) async for part in templates_api.event_stream(request, building, 0)]
        await asyncio.sleep(0)
        return sum(parts)

    await read()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert await read() > count * len(text)
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert left < 2_000_000
    assert len(templates_api._encoded) == 0


async def test_those_who_watch_share_what_is_sent(
    building: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    real = presenters.event_detail

    def detail(told: services.Event) -> BuildEvent:
        made.append(told.seq)
        return real(told)

    monkeypatch.setattr(presenters, "event_detail", detail)
    request = RequestFactory().get("/")

    async def watch() -> bytes:
        return b"".join([part async for part in templates_api.event_stream(request, building, 0)])

    watchers = [asyncio.create_task(watch()) for _ in range(5)]
    await asyncio.sleep(0.1)
    await sync_to_async(say)(building, "a", "b")
    await sync_to_async(finish)(building)
    (same,) = {part.replace(templates_api.KEEP_ALIVE, b"") for part in await gather(watchers)}
    assert same.count(b"event: output") == 2
    assert len(made) == len(set(made)) >= 3


async def gather(tasks: list[asyncio.Task[bytes]]) -> list[bytes]:
    async with asyncio.timeout(20):
        return await asyncio.gather(*tasks)


def finish(template_id: str) -> None:
    """The build ends."""
    template = Template.objects.get(pk=template_id)
    append_event(template, "published", {"image": "x"})
    Template.objects.filter(pk=template_id).update(status="ready")
    notify_progress(template_id)


async def numbers(template_id: str, after: int = 0, leave_at: int | None = None) -> list[int]:
    """The numbers that a viewer gets until the end, or until it has number ``leave_at``."""
    found: list[int] = []
    async with aclosing(services.follow_events(template_id, after)) as batches:
        async for batch in batches:
            found += [told.seq for told in batch]
            if leave_at is not None and found and found[-1] >= leave_at:
                break
    return found


async def test_every_viewer_has_every_event_once(building: str) -> None:
    viewers = [asyncio.create_task(numbers(building)) for _ in range(200)]
    for number in range(40):
        await sync_to_async(say)(building, f"{number}\n", "and on\n")
    await sync_to_async(finish)(building)
    whole = list(range(1, 83))
    assert await asyncio.gather(*viewers) == [whole] * 200


async def test_many_viewers_cost_one_reader(building: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def counted(template_id: str, after: int, limit: int) -> events.EventPage:
        looks.append(after)
        return page_of(template_id, after, limit)

    page_of = events.load_page
    monkeypatch.setattr(events, "load_page", counted)
    first = asyncio.create_task(numbers(building))
    await sync_to_async(say)(building, "one")
    others = [asyncio.create_task(numbers(building)) for _ in range(100)]
    for number in range(10):
        await sync_to_async(say)(building, str(number))
    await sync_to_async(finish)(building)
    await asyncio.gather(first, *others)
    assert len(looks) < 100


async def test_a_viewer_far_behind_reads_on_from_the_rows(building: str) -> None:
    await sync_to_async(say)(
        building, *(str(number) for number in range(3 * events.BUFFERED_EVENTS))
    )
    early = asyncio.create_task(numbers(building))
    late = asyncio.create_task(numbers(building, after=3 * events.BUFFERED_EVENTS))
    await sync_to_async(finish)(building)
    assert await early == list(range(1, 3 * events.BUFFERED_EVENTS + 3))
    assert await late == [3 * events.BUFFERED_EVENTS + 1, 3 * events.BUFFERED_EVENTS + 2]


async def test_leaving_and_coming_back_has_neither_gap_nor_repeat(building: str) -> None:
    async def again_and_again(stay: int) -> list[int]:
        found: list[int] = []
        while True:
            last = found[-1] if found else 0
            more = await numbers(building, last, leave_at=last + stay)
            if not more:
                return found
            found += more

    viewers = [asyncio.create_task(again_and_again(stay)) for stay in range(1, 20)]
    for number in range(60):
        await sync_to_async(say)(building, str(number))
    await sync_to_async(finish)(building)
    assert await asyncio.gather(*viewers) == [list(range(1, 63))] * len(viewers)


async def test_a_deleted_template_ends_the_stream(building: str) -> None:
    def delete() -> None:
        template = Template.objects.select_related("team").get(pk=building)
        services.delete_template(system_actor(template.team), building)

    viewer = asyncio.create_task(numbers(building))
    while not events._tails or not any(events._tails.values()):
        await asyncio.sleep(0.01)
    await sync_to_async(delete)()
    async with asyncio.timeout(20):
        assert await viewer in ([], [1])


async def test_nobody_watching_leaves_no_reader(building: str) -> None:
    await numbers(building, leave_at=1)
    assert not any(events._tails.values())
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if building in name]


async def test_a_reader_that_fails_tries_again(
    building: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_of, failures = events.load_page, [OSError("away"), OSError("away")]

    def failing(template_id: str, after: int, limit: int) -> events.EventPage:
        if failures:
            raise failures.pop()
        return page_of(template_id, after, limit)

    monkeypatch.setattr(events, "MAX_WAIT_SECONDS", 0.2)
    async with events.shared_tail(building) as tail:
        monkeypatch.setattr(events, "load_page", failing)
        await sync_to_async(say)(building, "one")
        while not await tail.wait_for_change(1):
            pass
    assert failures == []


async def test_a_database_that_is_away_for_a_moment_ends_no_stream(
    building: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = events.load_page, iter(range(6))

    def away(*asked: Any) -> services.EventPage:
        if next(fails, None) is not None:
            raise OperationalError("closed") from psycopg.OperationalError("closed")
        return real(*asked)

    monkeypatch.setattr(events, "load_page", away)
    monkeypatch.setattr(events, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(events, "DATABASE_RETRY_SECONDS", 0.1)
    await sync_to_async(say)(building, "a", "b")
    await sync_to_async(finish)(building)
    async with asyncio.timeout(60):
        told = [one.kind async for batch in events.follow_events(building, 0) for one in batch]
    assert told[-3:] == ["output", "output", "published"]
    assert next(fails, None) is None
