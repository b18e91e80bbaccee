"""A channel layer over PostgreSQL's LISTEN and NOTIFY: notices cross processes, and only commits.

A notice is a pointer (an id, a number), never data: whoever gets it reads the rows. Each process
listens on one connection and knows by itself which of its sockets are in which group.

``notify`` sends on Django's own connection, so the notice leaves when the transaction commits and
not at all if it is rolled back (NOTIFY, PostgreSQL manual). A notice can be missed in two ways,
and either way the consumer is told with a message of type ``layer.lost`` and closes its socket
with 1012, so that the page reconnects and reads anew:

* the listening connection broke: said to every consumer once it listens again;
* a consumer reads more slowly than notices come: its buffer is dropped.
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

# The PostgreSQL channel all notices of a database go through.
NOTICES = "orkestr_notices"
LARGEST_NOTICE = 7999  # bytes; NOTIFY's limit is "less than 8000"
BUFFERED = 100  # notices a consumer may be behind
LOST: Mapping[str, Any] = {"type": "layer.lost"}
SERVICE_RESTART = 1012  # RFC 6455's registry: come back in a moment
LISTEN_SECONDS = 10.0
LONGEST_PAUSE = 5.0

type Message = dict[str, Any]


def notify(group: str, message: Mapping[str, Any]) -> None:
    """Send ``message`` to a group of sockets, in every process, when the transaction commits.

    Sync, on Django's connection. Raises ``ValueError`` for a message that is no small pointer and
    ``TypeError`` for a group name that Channels does not take.
    """
    notify_all({group: message})


def notify_all(messages: Mapping[str, Mapping[str, Any]]) -> None:
    """The same to several groups, by one statement. Raises ``ValueError``, ``TypeError``."""
    for group in messages:
        _layer_names.require_valid_group_name(group)
    _notify(*({"group": group, "message": dict(said)} for group, said in messages.items()))


def _notify(*notices: Message) -> None:
    payloads = [json.dumps(notice, separators=(",", ":")) for notice in notices]
    for payload in payloads:
        if len(payload.encode()) > LARGEST_NOTICE:
            raise ValueError(f"a notice holds ids, not data: {len(payload)} bytes do not fit")
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload", [NOTICES, payloads]
        )


class LosesNotices:
    """For consumers: closes the socket when notices were lost, so that the page reads anew."""

    async def layer_lost(self, event: Message) -> None:
        """Channels calls this for a message of type ``layer.lost``."""
        await self.close(code=SERVICE_RESTART)  # type: ignore[attr-defined]


class Mailbox:
    """The notices one consumer has yet to read; too many become a single ``layer.lost``."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._lost = False

    def put(self, message: Message) -> None:
        """Add a notice."""
        if self._lost:
            return
        if self._messages.qsize() >= BUFFERED:
            self.lose()
        else:
            self._messages.put_nowait(message)

    def lose(self) -> None:
        """Drop what is waiting, and say so."""
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
        """Return once notices are heard. Raises ``TimeoutError`` when PostgreSQL is not there."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen_forever(), name="notices")
        async with asyncio.timeout(scaled(LISTEN_SECONDS)):
            await self._listening.wait()

    async def _listen_forever(self) -> None:
        pause = 0.1
        heard_before = False
        while True:
            try:
                await self._listen_once(after_a_loss=heard_before)
            except (psycopg.Error, OSError) as error:
                heard_before = heard_before or self._listening.is_set()
                pause = 0.1 if self._listening.is_set() else min(pause * 2, LONGEST_PAUSE)
                self._listening.clear()
                logger.warning("not listening for notices, trying again: %s", error)
            await asyncio.sleep(pause)

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
        """Put a channel into a group; again is fine."""
        self._members[group].add(channel)

    def leave(self, group: str, channel: str) -> None:
        """Take a channel out of a group; again is fine."""
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
    """What Channels calls. A channel can be joined to groups only in the process that made it."""

    extensions = ("groups", "flush")

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()

    def _hub(self) -> Hub:
        return self._hubs.setdefault(asyncio.get_running_loop(), Hub())

    async def new_channel(self, prefix: str = "specific") -> str:
        """The name of a new channel, which hears from now on."""
        hub = self._hub()
        await hub.listen()
        name = f"{prefix}.{secrets.token_hex(8)}!{secrets.token_hex(8)}"
        hub.mailboxes[name] = Mailbox()
        return name

    async def receive(self, channel: str) -> Message:
        """The next message for a channel. A reader that is cancelled gives the channel up."""
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
        await database_sync_to_async(_notify)({"channel": channel, "message": message})

    async def group_add(self, group: str, channel: str) -> None:
        """Put a channel of this process into a group. Whatever is sent from now on reaches it."""
        self.require_valid_group_name(group)
        hub = self._hub()
        hub.join(group, channel)
        await hub.listen()

    async def group_discard(self, group: str, channel: str) -> None:
        """Take a channel out of a group."""
        self._hub().leave(group, channel)

    async def group_send(self, group: str, message: Message) -> None:
        """Send to every channel in a group, now; see ``notify`` for sending on commit."""
        await database_sync_to_async(notify)(group, message)

    async def flush(self) -> None:
        """Forget every channel and group of this event loop and stop listening."""
        if hub := self._hubs.pop(asyncio.get_running_loop(), None):
            await hub.close()


_layer_names = BaseChannelLayer()
