"""Cancelled calls: ``notifications/cancelled`` ends the call that it names, in whichever process.

Of the two ways to cancel (MCP, "Cancellation"), this is that of clients which negotiate a version
at the beginning; the others just close the response, and whoever loses the connection is noticed
anyway. The notification is a request of its own, so any web process can get it. Each client gets an
id for its session, which nothing is stored for: it only tells apart the calls of two clients with
the same token, as each numbers its own from 1.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import anyio
from channels.layers import get_channel_layer
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError

from orkestr_console.accounts.actor import Actor
from orkestr_console.mcp.tool import ACTOR

logger = logging.getLogger(__name__)

SESSION_HEADER = "mcp-session-id"
CANCELLED = "notifications/cancelled"
# Notifications and handshakes are short.
MAX_PEEKED = 8 * 1024
# JSON-RPC error code of the protocol's SDK for the answer that ends a cancelled call's stream.
REQUEST_CANCELLED = -32800
GROUP = "mcp.cancelled"
RETRY_SECONDS = 5.0

type Calls = defaultdict[str, set[anyio.CancelScope]]

# The calls under way, by event loop and key.
_calls: WeakKeyDictionary[asyncio.AbstractEventLoop, Calls] = WeakKeyDictionary()


def new_session_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_urlsafe(16)


def call_key(actor: Actor, session: str, request_id: object) -> str | None:
    """What names a call to all web processes; None if its client has no session."""
    if not session or actor.token is None:
        return None
    named = json.dumps([actor.token.pk, session, request_id])
    return hashlib.sha256(named.encode()).hexdigest()


async def cancellable(ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
    """Let a tool's call be cancelled (a middleware of the SDK's server)."""
    request: Any = ctx.request
    if ctx.method != "tools/call" or request is None:
        return await call_next(ctx)
    session = request.headers.get(SESSION_HEADER, "")
    key = call_key(request.scope[ACTOR], session, ctx.request_id)
    if key is None:
        return await call_next(ctx)
    with under_way(key) as scope:
        return await call_next(ctx)
    assert scope.cancelled_caught
    raise MCPError(REQUEST_CANCELLED, "The call was cancelled, and what it did has been stopped.")


@contextmanager
def under_way(key: str) -> Iterator[anyio.CancelScope]:
    """The scope of a call that can be cancelled by its key."""
    calls = _calls.setdefault(asyncio.get_running_loop(), defaultdict(set))
    with anyio.CancelScope() as scope:
        calls[key].add(scope)
        try:
            yield scope
        finally:
            calls[key].discard(scope)
            if not calls[key]:
                del calls[key]


def cancel_here(key: str) -> bool:
    """Cancel a call of this event loop; whether there is one."""
    calls = _calls.get(asyncio.get_running_loop())
    found = list(calls[key]) if calls and key in calls else []
    for scope in found:
        scope.cancel()
    return bool(found)


async def cancel(actor: Actor, session: str, request_id: object) -> None:
    """Cancel a call of the same token and session, wherever it is."""
    key = call_key(actor, session, request_id)
    layer: Any = get_channel_layer()
    if key is not None and not cancel_here(key):
        await layer.group_send(GROUP, {"type": GROUP, "key": key})


async def listen() -> None:
    """Cancel calls that another process was told to cancel, for ever."""
    while True:
        try:
            await listen_once()
        except Exception:
            logger.warning("not listening for cancelled MCP calls, trying again", exc_info=True)
        await asyncio.sleep(RETRY_SECONDS)


async def listen_once() -> None:
    """The same until something fails. Raises what that is."""
    layer: Any = get_channel_layer()
    channel = await layer.new_channel("mcp")
    await layer.group_add(GROUP, channel)
    while True:
        message = await layer.receive(channel)
        if message["type"] == GROUP:
            cancel_here(message["key"])


def read_message(body: bytes) -> dict[str, Any]:
    """A short JSON-RPC message; blank if it is none, which the SDK finds out too."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
