"""Reading a build's events: a page at a time, or following them to the end.

The rows are the truth. A viewer holds the number of the last event it has, and gets what comes
after it: one that reconnects sees no gap and no repeat. All viewers of one build in a process share
one reader (:class:`Tail`), which reads once for all of them when there is a notice. The build knows
of none of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from channels.layers import get_channel_layer

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.threads import in_thread
from templates_app.events import template_group
from templates_app.models import Template, TemplateStatus
from templates_app.services.templates import get_template

logger = logging.getLogger(__name__)

DEFAULT_LIMIT = 200
MAX_LIMIT = 1000
# How many events a reader buffers for viewers that are a little behind.
BUFFERED_EVENTS = 256
MIN_READ_INTERVAL = 0.1  # seconds between two reads, however many notices there were
DATABASE_RETRY_SECONDS = 1.0
# Should a notice be lost, the events are read anyway.
MAX_WAIT_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Event:
    """One event. ``payload`` has the members of its kind, JSON-safe; ``at`` is when it happened."""

    seq: int
    kind: str
    at: datetime
    payload: dict[str, Any]


@dataclass(frozen=True)
class EventPage:
    """Some events in order. ``ended`` means that none will follow the last of them."""

    events: list[Event]
    ended: bool


def read_events(
    actor: Actor, template_id: str, *, after: int = 0, limit: int | None = None
) -> EventPage:
    """The events numbered above ``after``, at most ``limit``. Raises ``NotFound``."""
    template = get_template(actor, template_id)
    return load_page(template.pk, after, min(limit or DEFAULT_LIMIT, MAX_LIMIT))


def load_page(template_id: str, after: int, limit: int) -> EventPage:
    """The same for a template that the caller may read; an empty last page if it was deleted."""
    # The status first: all events of a build that is over are there for the next statement.
    template = Template.objects.filter(pk=template_id).first()
    if template is None:
        return EventPage([], ended=True)
    rows = list(template.events.filter(seq__gt=after)[: limit + 1])
    events = [Event(row.seq, row.kind, row.at, row.payload) for row in rows[:limit]]
    finished = template.status != TemplateStatus.BUILDING and len(rows) <= limit
    return EventPage(events, finished)


async def all_events(template_id: str) -> AsyncGenerator[list[Event]]:
    """Every event so far, in batches. For a template that the caller may read."""
    after = 0
    while True:
        page = await in_thread(load_page, template_id, after, DEFAULT_LIMIT)
        if not page.events:
            return
        yield page.events
        after = page.events[-1].seq


async def follow_events(template_id: str, after: int = 0) -> AsyncGenerator[list[Event]]:
    """The events numbered above ``after`` as they arrive, until the build is over.

    An empty list after every ``MAX_WAIT_SECONDS`` of silence. For a template that the
    caller may read.
    """
    async with shared_tail(template_id) as tail:
        while not await tail.wait_until_loaded():
            yield []
        while True:
            page = tail.after(after) or await load_page_if_available(template_id, after)
            if page is None:
                yield []
                await asyncio.sleep(DATABASE_RETRY_SECONDS)
                continue
            if page.events:
                after = page.events[-1].seq
                yield page.events
            if page.ended:
                return
            if not page.events and not await tail.wait_for_change(after):
                yield []


async def load_page_if_available(template_id: str, after: int) -> EventPage | None:
    """The next events from the database; None while it is away, which ends no stream."""
    try:
        return await in_thread(load_page, template_id, after, DEFAULT_LIMIT)
    except Exception as error:
        if unavailable(error) is None:
            raise
        return None


class Tail:
    """The latest events of one build, read once for all its viewers in this event loop."""

    def __init__(self, template_id: str) -> None:
        self.viewers = 0
        self._template_id = template_id
        self._events: deque[Event] = deque(maxlen=BUFFERED_EVENTS)
        self._last: int | None = None
        self._finished = False
        self._updated = asyncio.Condition()
        self._reader = asyncio.create_task(self._read_loop(), name=f"events of {template_id}")

    def after(self, seq: int) -> EventPage | None:
        """The events after ``seq``, from memory; None if the buffer doesn't reach back that far."""
        first = self._events[0].seq if self._events else (self._last or 0) + 1
        if self._last is None or seq + 1 < first:
            return None
        return EventPage([event for event in self._events if event.seq > seq], self._finished)

    async def wait_until_loaded(self) -> bool:
        """Wait for the first read; False if that takes longer than ``MAX_WAIT_SECONDS``."""
        return await self._wait_for(lambda: self._last is not None)

    async def wait_for_change(self, seq: int) -> bool:
        """Wait for an event after ``seq`` or the end; False after ``MAX_WAIT_SECONDS``."""
        return await self._wait_for(lambda: self._finished or (self._last or 0) > seq)

    async def _wait_for(self, condition: Callable[[], bool]) -> bool:
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS), self._updated:
                await self._updated.wait_for(condition)
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop reading, and free the buffer: it may be megabytes."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        # The task and this refer to each other, so only the cycle collector frees this.
        self._events.clear()

    async def _read_loop(self) -> None:
        """Read after every notice, and once when subscribed."""
        while not self._finished:
            # Subscribing fails while the database is away.
            with suppress(TimeoutError):
                async with subscribe(template_group(self._template_id)) as notice:
                    await self._read_on_notice(notice)

    async def _read_on_notice(self, notice: asyncio.Event) -> None:
        while not self._finished:
            notice.clear()
            try:
                await self._read_new()
            except Exception as error:
                if unavailable(error) is None:
                    logger.exception("could not read the events of %s", self._template_id)
            with suppress(TimeoutError):
                async with asyncio.timeout(MAX_WAIT_SECONDS):
                    await notice.wait()
            await asyncio.sleep(MIN_READ_INTERVAL)

    async def _read_new(self) -> None:
        if self._last is None:
            self._last = await in_thread(start_of_buffer, self._template_id, BUFFERED_EVENTS)
        while True:
            page = await in_thread(load_page, self._template_id, self._last, DEFAULT_LIMIT)
            self._events.extend(page.events)
            if page.events:
                self._last = page.events[-1].seq
            self._finished = page.ended
            async with self._updated:
                self._updated.notify_all()
            if page.ended or not page.events:
                return


@asynccontextmanager
async def subscribe(group: str) -> AsyncGenerator[asyncio.Event]:
    """An event that every notice to ``group`` sets, including one that says others were lost."""
    layer = get_channel_layer()
    assert layer is not None
    channel = await layer.new_channel()
    await layer.group_add(group, channel)
    notice = asyncio.Event()

    async def listen() -> None:
        while True:
            await layer.receive(channel)
            notice.set()

    listener = asyncio.create_task(listen(), name=f"notices to {group}")
    try:
        yield notice
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        await layer.group_discard(group, channel)


def start_of_buffer(template_id: str, count: int) -> int:
    """The number of the event before the last ``count``: where a new reader starts."""
    events = Template(pk=template_id).events.order_by("-seq").values_list("seq", flat=True)
    newest = events.first() or 0
    return max(newest - count, 0)


_tails: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Tail]] = WeakKeyDictionary()


@asynccontextmanager
async def shared_tail(template_id: str) -> AsyncGenerator[Tail]:
    """The shared reader of a build, which runs while anybody watches."""
    tails = _tails.setdefault(asyncio.get_running_loop(), {})
    tail = tails.get(template_id)
    if tail is None:
        tail = tails[template_id] = Tail(template_id)
    tail.viewers += 1
    try:
        yield tail
    finally:
        tail.viewers -= 1
        if tail.viewers == 0:
            if tails.get(template_id) is tail:
                del tails[template_id]
            await tail.close()
