"""A channel layer on PostgreSQL's LISTEN and NOTIFY: notices between processes, sent on commit.

A notice is a pointer (an id, a number), never data: its receiver reads the rows. Each process
listens on one connection, and keeps track of its own sockets' groups.

``notify`` sends on Django's own connection, so the notice is sent when the transaction commits, and
never if it is rolled back (NOTIFY, PostgreSQL manual). A notice can be lost in two ways. Either way
the consumer gets a message of type ``layer.lost`` and closes its socket with 1012, so that the page
reconnects and reads everything again:

* the listening connection broke: every consumer is notified once it listens again;
* a consumer reads more slowly than notices arrive: its buffer is dropped.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from channels.db import database_sync_to_async
from channels.layers import BaseChannelLayer
from django.db import connection

from hostruntime.host.patience import scaled
from orkestr_console.core.postgres import connection_arguments

logger = logging.getLogger(__name__)

# The PostgreSQL channel of all notices of a database.
NOTICES = "orkestr_notices"
# Sends the ``payloads`` of some notices; a part of a larger statement, too.
NOTIFY_SQL = f"SELECT pg_notify('{NOTICES}', payload) FROM unnest(%(notices)s::text[]) AS payload"  # noqa: S608
MAX_NOTICE_BYTES = 7999  # bytes; NOTIFY's limit is "less than 8000"
MAX_BUFFERED = 100  # notices per consumer
LOST: Mapping[str, Any] = {"type": "layer.lost"}
SERVICE_RESTART = 1012  # RFC 6455's registry: come back in a moment
LISTEN_SECONDS = 10.0
MAX_BACKOFF = 5.0

type Message = dict[str, Any]


def notify(group: str, message: Mapping[str, Any]) -> None:
    """Send ``message`` to a group of sockets, in every process, when the transaction commits.

    Synchronous, on Django's connection. Raises ``ValueError`` for a message that is too large, and
    ``TypeError`` for a group name that Channels doesn't accept.
    """
    notify_all({group: message})


def notify_all(messages: Mapping[str, Mapping[str, Any]]) -> None:
    """The same for several groups, with one statement. Raises ``ValueError``, ``TypeError``."""
    _send(payloads(messages))


def payloads(messages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The ``notices`` of ``NOTIFY_SQL`` for several groups. Raises as :func:`notify_all`."""
    for group in messages:
        _layer_names.require_valid_group_name(group)
    return [
        _payload({"group": group, "message": dict(message)}) for group, message in messages.items()
    ]


def _payload(notice: Message) -> str:
    payload = json.dumps(notice, separators=(",", ":"))
    if len(payload.encode()) > MAX_NOTICE_BYTES:
        raise ValueError(f"a notice holds ids, not data: {len(payload)} bytes do not fit")
    return payload


def _send(notices: list[str]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(NOTIFY_SQL, {"notices": notices})


def _send_to_channel(channel: str, message: Message) -> None:
    _send([_payload({"channel": channel, "message": message})])


class ReconnectsOnLoss:
    """A mixin for consumers: closes the socket when notices were lost, so the page reconnects."""

    async def layer_lost(self, event: Message) -> None:
        """Handle a message of type ``layer.lost``, as Channels dispatches it."""
        await self.close(code=SERVICE_RESTART)  # type: ignore[attr-defined]


class Mailbox:
    """A consumer's unread notices; too many become a single ``layer.lost``."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._lost = False

    def put(self, message: Message) -> None:
        """Add a notice."""
        if self._lost:
            return
        if self._messages.qsize() >= MAX_BUFFERED:
            self.lose()
        else:
            self._messages.put_nowait(message)

    def lose(self) -> None:
        """Replace what is waiting with ``layer.lost``."""
        while not self._messages.empty():
            self._messages.get_nowait()
        self._messages.put_nowait(dict(LOST))
        self._lost = True

    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return self._messages.empty()

    async def get(self) -> Message:
        """The next notice."""
        message = await self._messages.get()
        self._lost = False
        return message


class Hub:
    """The mailboxes and groups of one event loop, and the connection that fills them."""

    def __init__(self) -> None:
        self.mailboxes: dict[str, Mailbox] = {}
        self._members: defaultdict[str, set[str]] = defaultdict(set)
        self._listening = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Start listening. Raises ``TimeoutError`` if PostgreSQL is unreachable."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen_forever(), name="notices")
        async with asyncio.timeout(scaled(LISTEN_SECONDS)):
            await self._listening.wait()

    async def _listen_forever(self) -> None:
        delay = 0.1
        was_listening = False
        while True:
            try:
                await self._listen_once(after_a_loss=was_listening)
            except (psycopg.Error, OSError) as error:
                was_listening = was_listening or self._listening.is_set()
                delay = 0.1 if self._listening.is_set() else min(delay * 2, MAX_BACKOFF)
                self._listening.clear()
                logger.warning("not listening for notices, trying again: %s", error)
            await asyncio.sleep(delay)

    async def _listen_once(self, *, after_a_loss: bool) -> None:
        arguments = connection_arguments("notices")
        async with await psycopg.AsyncConnection.connect(**arguments) as listener:
            await listener.execute(f"LISTEN {NOTICES}")
            if after_a_loss:
                self._lose_everything()
            self._listening.set()
            async for notice in listener.notifies():
                self._deliver(notice.payload)
        raise psycopg.OperationalError("the connection ended")

    def _lose_everything(self) -> None:
        for mailbox in self.mailboxes.values():
            mailbox.lose()

    def _deliver(self, payload: str) -> None:
        notice = json.loads(payload)
        names = [notice["channel"]] if "channel" in notice else self.members(notice["group"])
        for name in names:
            if mailbox := self.mailboxes.get(name):
                mailbox.put(notice["message"])

    def members(self, group: str) -> list[str]:
        """The channels of this process that are in a group."""
        return list(self._members.get(group, ()))

    def join(self, group: str, channel: str) -> None:
        """Add a channel to a group; idempotent."""
        self._members[group].add(channel)

    def leave(self, group: str, channel: str) -> None:
        """Remove a channel from a group; idempotent."""
        if members := self._members.get(group):
            members.discard(channel)
            if not members:
                del self._members[group]

    def forget(self, channel: str) -> None:
        """Drop a channel that nobody will read again."""
        self.mailboxes.pop(channel, None)
        for group in [name for name, members in self._members.items() if channel in members]:
            self.leave(group, channel)

    async def close(self) -> None:
        """Stop listening."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._listening.clear()


class PgChannelLayer(BaseChannelLayer):
    """The interface for Channels. Only the process that created a channel can add it to groups."""

    extensions = ("groups", "flush")

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()

    def _hub(self) -> Hub:
        return self._hubs.setdefault(asyncio.get_running_loop(), Hub())

    async def new_channel(self, prefix: str = "specific") -> str:
        """The name of a new channel, which receives from now on."""
        hub = self._hub()
        await hub.listen()
        name = f"{prefix}.{secrets.token_hex(8)}!{secrets.token_hex(8)}"
        hub.mailboxes[name] = Mailbox()
        return name

    async def receive(self, channel: str) -> Message:
        """The next message for a channel. A cancelled reader forgets the channel."""
        hub = self._hub()
        mailbox = hub.mailboxes.get(channel)
        if mailbox is None:
            self.require_valid_channel_name(channel)
            await hub.listen()
            mailbox = hub.mailboxes.setdefault(channel, Mailbox())
        try:
            return await mailbox.get()
        except asyncio.CancelledError:
            hub.forget(channel)
            raise

    async def send(self, channel: str, message: Message) -> None:
        """Send to one channel, in whichever process it is."""
        self.require_valid_channel_name(channel)
        await database_sync_to_async(_send_to_channel)(channel, message)

    async def group_add(self, group: str, channel: str) -> None:
        """Add a channel of this process to a group. It receives whatever is sent from now on."""
        self.require_valid_group_name(group)
        hub = self._hub()
        hub.join(group, channel)
        await hub.listen()

    async def group_discard(self, group: str, channel: str) -> None:
        """Remove a channel from a group."""
        self._hub().leave(group, channel)

    async def group_send(self, group: str, message: Message) -> None:
        """Send to every channel in a group, now; see ``notify`` for sending on commit."""
        await database_sync_to_async(notify)(group, message)

    async def flush(self) -> None:
        """Forget every channel and group of this event loop and stop listening."""
        if hub := self._hubs.pop(asyncio.get_running_loop(), None):
            await hub.close()


_layer_names = BaseChannelLayer()
