"""Where MCP comes in: Streamable HTTP, without sessions, a token in every request.

Any web process can answer any request, for there is nothing to remember between two of them. The
door is ours, not the SDK's: hosts and origins as everywhere else in the console, the token, and
its rate. There is no standalone stream and no session to end, so GET and DELETE are refused, as
the specification has it for servers like that.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from asgiref.sync import ThreadSensitiveContext
from django.conf import settings
from django.http.request import split_domain_port, validate_host
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from orkestr_console.accounts import services
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.errors import DomainError, Forbidden, MethodNotAllowed, Unauthenticated
from orkestr_console.core.ids import new_id
from orkestr_console.core.postgres import unavailable
from orkestr_console.mcp.server import build_server
from orkestr_console.mcp.tool import ACTOR, REQUEST_ID, ask

HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application."""
    request_id = new_id("req")
    answer = with_headers(send, request_id)
    request = Request(scope)
    # What follows runs in a thread of this request, not in one that all of them share.
    async with ThreadSensitiveContext():
        try:
            actor = await admitted(request)
        except Exception as error:
            told = error if isinstance(error, DomainError) else unavailable(error)
            if told is None:
                raise
            wire = {**told.to_wire(), "request_id": request_id}
            refusal = JSONResponse(wire, told.status, told.all_headers())
            await refusal(scope, receive, answer)
            return
        known = {**scope, ACTOR: actor, REQUEST_ID: request_id}
        manager = await running_manager()
        await manager.handle_request(known, receive, answer)


def with_headers(send: Send, request_id: str) -> Send:
    """A ``send`` that adds what every answer of the console says."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message.get("headers", [])}
            ours = {**HEADERS, "X-Request-Id": request_id}
            added = [
                (name.lower().encode(), value.encode())
                for name, value in ours.items()
                if name.lower().encode() not in given
            ]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


async def admitted(request: Request) -> Actor:
    """Who is calling. Raises ``Forbidden``, ``MethodNotAllowed``, ``Unauthenticated`` and so on."""
    refuse_other_sites(request)
    if request.method != "POST":
        raise MethodNotAllowed(request.method, ("POST",))
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated
    address = request.client.host if request.client else None
    actor = await ask(services.authenticate_token, token.strip(" "), "mcp", address)
    actor.require(READ)
    return actor


def refuse_other_sites(request: Request) -> None:
    """Raise ``Forbidden`` unless the host is ours, and the page, if one is calling, too.

    A page of another site that had its name point here could call otherwise (MCP, "Security
    Warning" of Streamable HTTP).
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
    if not validate_host(split_domain_port(host)[0], settings.ALLOWED_HOSTS):
        raise Forbidden("This server does not answer to that host name; use its own address.")
    own = {f"http://{host}", f"https://{host}", *settings.CSRF_TRUSTED_ORIGINS}
    if origin and origin not in own:
        raise Forbidden("Pages of other sites can't call this server.")


@dataclass
class Running:
    """The SDK's request handler of one event loop, and the task that keeps it running."""

    manager: StreamableHTTPSessionManager
    started: asyncio.Event
    keeper: asyncio.Task[None]


_running: WeakKeyDictionary[asyncio.AbstractEventLoop, Running] = WeakKeyDictionary()


async def running_manager() -> StreamableHTTPSessionManager:
    """The request handler of this event loop, started when it is first asked for.

    Daphne has no lifespan events. What it runs ends with the loop.
    """
    loop = asyncio.get_running_loop()
    running = _running.get(loop)
    if running is None:
        manager, started = build_manager(), asyncio.Event()
        keeper = asyncio.create_task(keep(manager, started), name="mcp")
        running = _running[loop] = Running(manager, started, keeper)
    await running.started.wait()
    return running.manager


def build_manager() -> StreamableHTTPSessionManager:
    """A request handler that remembers nothing between two requests."""
    server = build_server()
    server.streamable_http_app(
        stateless_http=True,
        max_request_body_size=settings.LARGEST_BODY,
        # The door above knows the console's own rules for hosts.
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    return server.session_manager


async def keep(manager: StreamableHTTPSessionManager, started: asyncio.Event) -> None:
    """Run the handler until cancelled: it must be left by the task that entered it."""
    async with manager.run():
        started.set()
        await asyncio.Event().wait()


async def close() -> None:
    """Stop the handler of this event loop; for tests, whose loops end one by one."""
    running = _running.pop(asyncio.get_running_loop(), None)
    if running is not None:
        running.keeper.cancel()
        with suppress(asyncio.CancelledError):
            await running.keeper
