"""Live pages: a WebSocket that re-reads rows and sends the HTML that changed.

Messages to the page are JSON objects (large ones in several frames) with a ``kind``:

``swap {html}``                       each element in it replaces the one with its id
``append {steps, seq}``   new output by step: the complete ``lines``, the unfinished ``tail`` and
                          its line number, ``next``; and the last event that the page then has
``gone {}``                           what the page shows was deleted

A notice on the channel layer only says that something changed. A burst of notices is handled
together, at most ten times a second.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress
from importlib import import_module
from typing import Any

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncWebsocketConsumer
from django.conf import settings
from django.contrib.auth import get_user
from django.http import HttpRequest
from django.http.request import split_domain_port, validate_host
from django.urls import URLPattern, path

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.people import people_group
from orkestr_console.accounts.services import session_actor
from orkestr_console.accounts.sessions import person_group
from orkestr_console.core.channel_layer import SERVICE_RESTART, ReconnectsOnLoss
from orkestr_console.core.errors import Forbidden, NotFound, Unauthenticated
from orkestr_console.core.postgres import unavailable

logger = logging.getLogger(__name__)

UNAUTHENTICATED = 4401
NOT_FOUND = 4404
# The server accepts and sends frames of up to 64 KiB (orkestr_console.http.daphne). A frame that
# starts with CONTINUATION is continued by the next one; JSON never starts with it.
MAX_FRAME = 60 * 1024
CONTINUATION = "+"
MIN_SEND_INTERVAL = 0.1  # seconds between two updates, however many notices there were

type Message = dict[str, Any]


class LivePage(ReconnectsOnLoss, AsyncWebsocketConsumer):
    """The base of the live consumers. A subclass defines its groups and its changes."""

    # Seconds after which to refresh even without a notice; None for never.
    refresh_after: float | None = None

    def channel_groups(self, actor: Actor) -> list[str]:
        """The channel groups of the page. Raises ``NotFound``."""
        raise NotImplementedError

    def changes(self, actor: Actor) -> list[Message]:
        """What the page doesn't have yet; runs in a thread. Raises ``NotFound``."""
        raise NotImplementedError

    async def connect(self) -> None:
        """Accept first: a browser only learns the close code of a socket that was open."""
        self._notified = asyncio.Event()
        self._sent: dict[str, str] = {}
        self._sender: asyncio.Task[None] | None = None
        self._joined: list[str] = []
        await self.accept()
        if not self._same_origin():
            await self.close(code=UNAUTHENTICATED)
            return
        try:
            # Joined before the first read, so that no notice is lost in between.
            self._joined = await database_sync_to_async(self._groups)()
            for group in self._joined:
                await self.channel_layer.group_add(group, self.channel_name)
        except (Unauthenticated, Forbidden):
            await self.close(code=UNAUTHENTICATED)
        except NotFound:
            await self._send_gone()
        except Exception as error:
            # The page reconnects and reads again once the database is back.
            if unavailable(error) is None:
                raise
            await self.close(code=SERVICE_RESTART)
        else:
            self._notified.set()
            self._sender = asyncio.create_task(self._send_changes())

    async def disconnect(self, code: int) -> None:
        """Leave no task behind."""
        for group in self._joined:
            await self.channel_layer.group_discard(group, self.channel_name)
        sender, self._sender = self._sender, None
        if sender is not None and sender is not asyncio.current_task():
            sender.cancel()
            with suppress(asyncio.CancelledError):
                await sender

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        """Ignore messages from pages."""

    async def template_changed(self, event: Message) -> None:
        """A template changed."""
        self._notified.set()

    async def sandbox_changed(self, event: Message) -> None:
        """A sandbox changed."""
        self._notified.set()

    async def people_changed(self, event: Message) -> None:
        """The team's members or roles changed: access may have ended."""
        self._notified.set()

    async def session_ended(self, event: Message) -> None:
        """One of the person's sessions ended, perhaps the page's own."""
        self._notified.set()

    async def _send_changes(self) -> None:
        """Send changes on every notice until the page leaves; re-check access each time."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.refresh_after):
                    await self._notified.wait()
            self._notified.clear()
            try:
                for message in await database_sync_to_async(self._changes)():
                    await self._send_message(message)
            except (Unauthenticated, Forbidden):
                await self.close(code=UNAUTHENTICATED)
                return
            except NotFound:
                await self._send_gone()
                return
            except Exception as error:
                if unavailable(error) is None:
                    logger.exception("could not send changes to a page")
                await self.close(code=SERVICE_RESTART)
                return
            await asyncio.sleep(MIN_SEND_INTERVAL)

    async def _send_message(self, message: Message) -> None:
        """Send a message, in as many frames as it needs."""
        text = json.dumps(message)
        while len(text) > MAX_FRAME:
            await self.send(f"{CONTINUATION}{text[:MAX_FRAME]}")
            text = text[MAX_FRAME:]
        await self.send(text)

    async def _send_gone(self) -> None:
        await self._send_message({"kind": "gone"})
        await self.close(code=NOT_FOUND)

    def _groups(self) -> list[str]:
        actor = self._actor()
        assert actor.user is not None
        return [
            *self.channel_groups(actor),
            people_group(actor.team.pk),
            person_group(actor.user.pk),
        ]

    def _changes(self) -> list[Message]:
        return self.changes(self._actor())

    def _actor(self) -> Actor:
        """The actor of the session's current state: it may have ended meanwhile."""
        request = HttpRequest()
        store = import_module(settings.SESSION_ENGINE).SessionStore
        request.session = store(self.scope["session"].session_key)
        user = get_user(request)
        if not user.is_authenticated:
            raise Unauthenticated
        request.user = user
        return session_actor(request)

    def changed_fragments(self, fragments: dict[str, str]) -> list[Message]:
        """One ``swap`` with the fragments (element id → HTML) that changed since the last one."""
        changed = [html for key, html in fragments.items() if self._sent.get(key) != html]
        self._sent.update(fragments)
        return [{"kind": "swap", "html": "".join(changed)}] if changed else []

    def _header(self, name: bytes) -> str:
        return next((v.decode("latin-1") for k, v in self.scope["headers"] if k == name), "")

    @property
    def address(self) -> str:
        """The console's address as the browser sees it, for snippets."""
        return self._header(b"origin")

    def _same_origin(self) -> bool:
        """Whether a page of this console opened it: cookies alone don't prove it (RFC 6455, 10.2).

        The host must be one of ours, as for HTTP: a name rebound to our address is not. With TLS,
        the page must have been loaded over TLS, too.
        """
        origin, host = self._header(b"origin"), self._header(b"host")
        if origin in settings.CSRF_TRUSTED_ORIGINS:
            return True
        scheme, _, origin_host = origin.partition("://")
        known = validate_host(split_domain_port(host)[0], settings.ALLOWED_HOSTS)
        secure = scheme == "https" or (scheme == "http" and not settings.SESSION_COOKIE_SECURE)
        return known and secure and origin_host == host


def live_page(route: str, consumer: type[LivePage]) -> URLPattern:
    """An entry of ``websocket_urlpatterns``."""
    # Channels routes with Django's patterns, whose types know only views.
    application: Any = consumer.as_asgi()
    pattern: URLPattern = path(route, application)
    return pattern
