"""The MCP endpoint: Streamable HTTP, with a token in every request.

Nothing is stored between two requests, so any web process can answer any of them; a session's id
only tells whose calls are whose (:mod:`orkestr_console.mcp.cancelling`). Access control is
ours, not the SDK's: the hosts and origins that the rest of the console accepts, the token, and its
rate limit. There is no standalone stream and no session to end, so GET and DELETE are refused, as
the specification requires of such servers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
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
from orkestr_console.core.errors import (
    DomainError,
    Forbidden,
    MethodNotAllowed,
    PayloadTooLarge,
    Unauthenticated,
    rpc_error,
)
from orkestr_console.core.ids import new_id
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.headers import API_HEADERS, REQUEST_ID_HEADER
from orkestr_console.mcp import cancelling
from orkestr_console.mcp.server import build_server
from orkestr_console.mcp.tool import ACTOR, REQUEST_ID, call_service


async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application."""
    request_id = new_id("req")
    send = with_headers(send, {**API_HEADERS, REQUEST_ID_HEADER: request_id})
    request = Request(scope)
    # The services run in a thread of this request, not in one that all requests share.
    async with ThreadSensitiveContext():
        try:
            actor = await authenticate(request)
            refuse_too_large(request)
        except PayloadTooLarge as error:
            await JSONResponse(rpc_error(error), error.status)(scope, receive, send)
            return
        except Exception as error:
            refusal = error if isinstance(error, DomainError) else unavailable(error)
            if refusal is None:
                raise
            wire = {**refusal.to_wire(), "request_id": request_id}
            response = JSONResponse(wire, refusal.status, refusal.all_headers())
            await response(scope, receive, send)
            return
        authenticated = {**scope, ACTOR: actor, REQUEST_ID: request_id}
        message, receive = await peek(request, receive)
        if message.get("method") == cancelling.CANCELLED:
            await cancel(request, actor, message)
        if message.get("method") == "initialize":
            send = with_headers(send, {cancelling.SESSION_HEADER: cancelling.new_session_id()})
        manager = await request_manager()
        await manager.handle_request(authenticated, receive, send)


def refuse_too_large(request: Request) -> None:
    """Raise ``PayloadTooLarge``, which the server itself raises for bodies of unknown length."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > settings.LARGEST_BODY:
        raise PayloadTooLarge(settings.LARGEST_BODY)


async def peek(request: Request, receive: Receive) -> tuple[dict[str, Any], Receive]:
    """The message of a short request, blank for others, and a ``receive`` that repeats its body."""
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > cancelling.MAX_PEEKED:
        return {}, receive
    body, last = b"", await receive()
    while last["type"] == "http.request":
        body += last.get("body", b"")
        if not last.get("more_body", False) or len(body) > cancelling.MAX_PEEKED:
            break
        last = await receive()
    kept: list[Message] = [{**last, "body": body}] if last["type"] == "http.request" else [last]

    async def again() -> Message:
        return kept.pop() if kept else await receive()

    return cancelling.read_message(body), again


async def cancel(request: Request, actor: Actor, message: dict[str, Any]) -> None:
    """Cancel the call that a notification names."""
    named = message.get("params")
    call = named.get("requestId") if isinstance(named, dict) else None
    session = request.headers.get(cancelling.SESSION_HEADER, "")
    if isinstance(call, str | int):
        await cancelling.cancel(actor, session, call)


def with_headers(send: Send, headers: Mapping[str, str]) -> Send:
    """A ``send`` that adds headers to the response, unless it has them."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message.get("headers", [])}
            added = [
                (name.lower().encode(), value.encode())
                for name, value in headers.items()
                if name.lower().encode() not in present
            ]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return send_with_headers


async def authenticate(request: Request) -> Actor:
    """Who is calling. Raises ``Forbidden``, ``MethodNotAllowed``, ``Unauthenticated``, …"""
    refuse_other_sites(request)
    if request.method != "POST":
        raise MethodNotAllowed(request.method, ("POST",))
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthenticated
    address = request.client.host if request.client else None
    actor = await call_service(services.authenticate_token, token.strip(" "), "mcp", address)
    actor.require(READ)
    return actor


def refuse_other_sites(request: Request) -> None:
    """Raise ``Forbidden`` unless the host is ours, and so is the origin if there is one.

    Otherwise another site could point its name here and let its pages call us (MCP, "Security
    Warning" of Streamable HTTP).
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
    if not validate_host(split_domain_port(host)[0], settings.ALLOWED_HOSTS):
        raise Forbidden("This server does not answer to that host name; use its own address.")
    own = {f"http://{host}", f"https://{host}", *settings.CSRF_TRUSTED_ORIGINS}
    if origin and origin not in own:
        raise Forbidden("Pages of other sites can't call this server.")


@dataclass
class RunningManager:
    """The SDK's request handler of one event loop, and the task that runs it."""

    manager: StreamableHTTPSessionManager
    started: asyncio.Event
    runner: asyncio.Task[None]


_running: WeakKeyDictionary[asyncio.AbstractEventLoop, RunningManager] = WeakKeyDictionary()


async def request_manager() -> StreamableHTTPSessionManager:
    """The request handler of this event loop, started on first use.

    Daphne has no lifespan events to start it with. It ends with the loop.
    """
    loop = asyncio.get_running_loop()
    running = _running.get(loop)
    if running is None:
        manager, started = build_manager(), asyncio.Event()
        runner = asyncio.create_task(run_until_cancelled(manager, started), name="mcp")
        running = _running[loop] = RunningManager(manager, started, runner)
    await running.started.wait()
    return running.manager


def build_manager() -> StreamableHTTPSessionManager:
    """A request handler that stores nothing between two requests."""
    server = build_server()
    server.streamable_http_app(
        stateless_http=True,
        max_request_body_size=settings.LARGEST_BODY,
        # refuse_other_sites applies the console's own rules for hosts.
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
    )
    return server.session_manager


async def run_until_cancelled(
    manager: StreamableHTTPSessionManager, started: asyncio.Event
) -> None:
    """Run the handler. The task that enters its context has to be the one that leaves it."""
    async with manager.run():
        started.set()
        await cancelling.listen()


async def close() -> None:
    """Stop the handler of this event loop; for tests, each of which has a loop of its own."""
    running = _running.pop(asyncio.get_running_loop(), None)
    if running is not None:
        running.runner.cancel()
        with suppress(asyncio.CancelledError):
            await running.runner
