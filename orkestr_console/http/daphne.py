"""Daphne with back-pressure, body limits and a clean shutdown.

Stock Daphne buffers whatever a view sends until the client has read it, and whatever a client sends
until the view has read it. Here

* a view that sends faster than the client reads has to wait, and a client that reads nothing for
  ``STALL_TIMEOUT`` is disconnected;
* a body over the limit is refused with 413 as soon as its length is known or exceeded, and one
  below it waits in a file until the application reads it;
* a client that waits long for an API call gets an interim response every nine seconds;
* SIGTERM stops accepting connections, asks WebSockets to reconnect (1012), lets running requests
  finish for ``GRACE_SECONDS``, and then exits.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

# First: it installs the asyncio reactor that everything of Twisted below then finds.
from daphne.server import Server, twisted_loop  # isort: skip
from daphne.http_protocol import HTTPFactory, WebRequest
from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol
from django.conf import settings
from twisted.internet import reactor as installed_reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.interfaces import IPushProducer
from twisted.logger import globalLogBeginner
from zope.interface import implementer

from hostruntime.host.patience import scaled
from orkestr_console.core.errors import DomainError, Internal, InvalidInput, PayloadTooLarge
from orkestr_console.core.ids import new_id
from orkestr_console.http import closing, interim

reactor: Any = installed_reactor
describe: Callable[..., Any] = serverFromString
begin_logging: Callable[..., None] = globalLogBeginner.beginLoggingTo
# Twisted's own log has a line for every request.
NO_OBSERVERS: list[Callable[[object], None]] = [lambda _: None]
logger = logging.getLogger(__name__)

STALL_TIMEOUT = 60.0
GRACE_SECONDS = 4.0
# How long a refused client may keep sending before it is disconnected, so that it can read the
# reason: closing a socket with unread data makes the kernel discard the response (RFC 9112,
# section 9.6).
LINGER_SECONDS = 2.0
CHUNK_BYTES = 64 * 1024
SERVICE_RESTART = 1012  # RFC 6455, section 7.4.2, and its registry

# The headers of responses that bypass the application and its middleware.
ERROR_HEADERS = {
    "Content-Type": "application/json",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

type Message = dict[str, Any]
type Application = Callable[..., Awaitable[None]]


@implementer(IPushProducer)
class Backpressure:
    """Whether a transport accepts more: Twisted pauses and resumes it, senders wait for it."""

    def __init__(self) -> None:
        self._writable = asyncio.Event()
        self._writable.set()

    def pauseProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The transport's buffer is full."""
        self._writable.clear()

    def resumeProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The transport's buffer is empty again."""
        self._writable.set()

    def stopProducing(self) -> None:  # noqa: N802 - Twisted's name
        """The connection is gone: release all waiters."""
        self._writable.set()

    async def wait(self) -> bool:
        """Wait until more can be sent; False if the peer has stalled for too long."""
        if self._writable.is_set():
            return True
        try:
            async with asyncio.timeout(STALL_TIMEOUT):
                await self._writable.wait()
        except TimeoutError:
            return False
        return True


class RequestQueue:
    """The application's input: the request's body, read on demand, then events."""

    def __init__(self, body: io.BufferedIOBase) -> None:
        self._body: io.BufferedIOBase | None = body
        self._events: asyncio.Queue[Message] = asyncio.Queue()

    async def get(self) -> Message:
        """The next ASGI message."""
        if self._body is None:
            return await self._events.get()
        chunk = self._body.read(CHUNK_BYTES)
        more = len(chunk) == CHUNK_BYTES
        if not more:
            self.close()
        return {"type": "http.request", "body": chunk, "more_body": more}

    def put_nowait(self, message: Message) -> None:
        """Drop Daphne's own copy of the body; pass a disconnect on, which ends the body."""
        if message["type"] != "http.request":
            self.close()
            self._events.put_nowait(message)

    def close(self) -> None:
        """Close the body's file."""
        if self._body is not None:
            self._body.close()
            self._body = None


class BoundedRequest(WebRequest):  # type: ignore[misc]
    """A request whose body has a limit and whose response waits for its reader."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backpressure = Backpressure()
        self._received = 0
        self._refused = False
        self._interim: Any = None

    def gotLength(self, length: int | None) -> None:  # noqa: N802 - Twisted's name
        """The headers are in; ``length`` is None for a chunked body."""
        super().gotLength(length)
        if length is not None and length > settings.LARGEST_BODY:
            self._refuse()

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """A piece of the body, in any transfer encoding."""
        self._received += len(data)
        if self._received > settings.LARGEST_BODY and not self._refused:
            self._refuse()
        if not self._refused:
            super().handleContentChunk(data)

    def requestReceived(self, *args: bytes) -> None:  # noqa: N802 - Twisted's name
        """The body is complete."""
        if not self._refused:
            super().requestReceived(*args)

    def process(self) -> Any:
        """Start the request, without the client's ``Daphne-Root-Path`` header.

        Daphne accepts it from anybody, and every link would start with it.
        """
        self.requestHeaders.removeHeader(b"daphne-root-path")
        answer = interim.interim_answer(
            protocol=self.clientproto,
            path=self.path,
            agent=self.getHeader(b"user-agent") or b"",
            connection=self.getHeader(b"connection") or b"",
        )
        if answer is not None and settings.INTERIM_ANSWERS:
            self._interim = reactor.callLater(interim.INTERIM_SECONDS, self._send_interim, answer)
        return super().process()

    def _send_interim(self, answer: bytes) -> None:
        """Send an interim response, and schedule the next."""
        self.channel.transport.write(answer)
        self._interim = reactor.callLater(interim.INTERIM_SECONDS, self._send_interim, answer)

    def _cancel_interim(self) -> None:
        """Stop sending interim responses."""
        if self._interim is not None and self._interim.active():
            self._interim.cancel()
        self._interim = None

    def basic_error(self, status: int, status_text: bytes, body: str) -> None:
        """Daphne's own errors, in the form of all others."""
        error = InvalidInput(f"{body}.") if status < 500 else Internal()
        answer, headers = error_body(error)
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.handle_reply({"type": "http.response.start", "status": status, "headers": encoded})
        self.handle_reply({"type": "http.response.body", "body": answer})

    def _refuse(self) -> None:
        """Send 413 now, read no more, and close once the client has had time to read it."""
        self._refused = True
        self.requestHeaders.removeHeader(b"expect")
        transport = self.channel.transport
        transport.write(error_response(PayloadTooLarge(settings.LARGEST_BODY)))
        transport.loseWriteConnection()
        reactor.callLater(LINGER_SECONDS, transport.abortConnection)

    def handle_reply(self, message: Message) -> None:
        """Send a piece of the response; the first one registers for back-pressure."""
        self._cancel_interim()
        starts = message["type"] == "http.response.start"
        if starts and not self.finished and self.channel is not None and self.producer is None:
            self.registerProducer(self.backpressure, streaming=True)
        super().handle_reply(message)

    def finish(self) -> None:
        """The response is complete."""
        if self.producer is not None:
            self.unregisterProducer()
        super().finish()

    def connectionLost(self, reason: Any) -> None:  # noqa: N802 - Twisted's name
        """The client has gone."""
        self._cancel_interim()
        self.backpressure.stopProducing()
        super().connectionLost(reason)

    def cut_off(self) -> None:
        """Close the connection without waiting for unsent data."""
        if self.channel is not None:
            self.channel.forceAbortClient()


class BoundedWebSocket(WebSocketProtocol):  # type: ignore[misc]
    """A WebSocket whose sender waits for its reader."""

    def __init__(self) -> None:
        super().__init__()
        self.backpressure = Backpressure()

    def onOpen(self) -> None:  # noqa: N802 - autobahn's name
        """The handshake is done: the HTTP side no longer produces for this transport."""
        self.transport.unregisterProducer()
        self.transport.registerProducer(self.backpressure, True)  # noqa: FBT003
        super().onOpen()

    def onClose(self, *args: Any) -> None:  # noqa: N802 - autobahn's name
        """The socket has closed."""
        self.backpressure.stopProducing()
        super().onClose(*args)

    def cut_off(self) -> None:
        """Close the connection without waiting for unsent data."""
        self.transport.abortConnection()


class BoundedHTTPFactory(HTTPFactory):  # type: ignore[misc]
    """Creates channels whose requests are bounded."""

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802 - Twisted's name
        """One protocol for each connection."""
        protocol = super().buildProtocol(addr)
        protocol.requestFactory = BoundedRequest
        return protocol


def error_response(error: PayloadTooLarge) -> bytes:
    """A complete HTTP response for a request that never reaches the application."""
    body, headers = error_body(error)
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {error.status} Payload Too Large\r\n{fields}Connection: close\r\n\r\n"
    return head.encode() + body


def error_body(error: DomainError) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a response that bypasses the application."""
    body = json.dumps(error.to_wire()).encode()
    length = {"Content-Length": str(len(body)), "X-Request-Id": new_id("req")}
    return body, {**ERROR_HEADERS, **length}


class ConsoleServer(Server):  # type: ignore[misc]
    """Daphne with the limits of this module. ``run()`` returns when the process may end."""

    def __init__(self, application: Application, endpoints: Sequence[str]) -> None:
        super().__init__(
            application,
            endpoints=list(endpoints),
            signal_handlers=False,
            ping_interval=20,
            ping_timeout=30,
            websocket_max_message_size=64 * 1024,
            websocket_max_frame_size=64 * 1024,
            application_close_timeout=round(scaled(5)),
            server_name="",
        )
        self.failure: str | None = None
        self._ports: list[Any] = []
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until ``failure`` is set.

        Replaces Daphne's own, which chooses its protocols where a subclass cannot reach them.
        """
        self.connections: dict[Any, dict[str, Any]] = {}
        self._make_factories()
        begin_logging(NO_OBSERVERS, redirectStandardIO=False, discardBuffer=True)
        reactor.callLater(1, self.application_checker)
        reactor.callLater(2, self.timeout_checker)
        asyncio.set_event_loop(twisted_loop)
        for description in self.endpoints:
            endpoint: Any = describe(reactor, description)
            listening = endpoint.listen(self.http_factory)
            listening.addCallbacks(self.listen_success, self.listen_error)
        for number in (signal.SIGTERM, signal.SIGINT):
            twisted_loop.add_signal_handler(number, self.stop_gracefully)
        reactor.addSystemEventTrigger("before", "shutdown", self.kill_all_applications)
        if self.failure is None:
            reactor.run(installSignalHandlers=False)

    def _make_factories(self) -> None:
        self.http_factory = BoundedHTTPFactory(self)
        self.ws_factory = WebSocketFactory(self, server=self.server_name)
        self.ws_factory.protocol = BoundedWebSocket
        self.ws_factory.setProtocolOptions(
            autoPingTimeout=self.ping_timeout,
            allowNullOrigin=True,
            openHandshakeTimeout=self.websocket_handshake_timeout,
            maxMessagePayloadSize=self.websocket_max_message_size,
            maxFramePayloadSize=self.websocket_max_frame_size,
        )

    def listen_success(self, port: Any) -> None:
        """One endpoint listens."""
        self._ports.append(port)
        super().listen_success(port)

    def listen_error(self, failure: Any) -> None:
        """An endpoint cannot listen: stop, and keep the reason."""
        self.failure = failure.getErrorMessage()
        self.stop()

    def create_application(self, protocol: Any, scope: Message) -> Any:
        """Start the application for a request, with its body on demand."""
        client = scope.get("client")
        if client:
            # One socket listens for both families, and maps IPv4 clients to IPv6.
            client[0] = client[0].removeprefix("::ffff:")
        if scope["type"] != "http":
            return super().create_application(protocol, scope)
        scope.setdefault("asgi", {"version": "3.0"})
        # Daphne copies protocol.content into memory next: leave it nothing to copy.
        body, protocol.content = protocol.content, io.BytesIO()
        queue = RequestQueue(body)
        application = self.application(
            scope=scope, receive=queue.get, send=partial(self.handle_reply, protocol)
        )
        if protocol not in self.connections:
            queue.close()
            return None
        self.connections[protocol]["application_instance"] = asyncio.ensure_future(application)
        return queue

    async def handle_reply(self, protocol: Any, message: Message) -> None:
        """Pass a message to the client, and wait until it accepts more."""
        await super().handle_reply(protocol, message)
        if not await protocol.backpressure.wait():
            logger.warning("disconnected a client that read nothing for %.0f s", STALL_TIMEOUT)
            protocol.cut_off()

    def stop_gracefully(self) -> None:
        """Stop accepting, let running requests finish, then stop; a second call stops at once."""
        if self._stopping:
            self.stop()
            return
        self._stopping = True
        for port in self._ports:
            port.stopListening()
        for protocol in list(self.connections):
            if isinstance(protocol, BoundedWebSocket) and protocol.state == protocol.STATE_OPEN:
                protocol.serverClose(SERVICE_RESTART)
        reactor.callLater(GRACE_SECONDS, self.stop)
        self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        if any(not task.done() for task in self._applications()):
            reactor.callLater(0.05, self._stop_when_idle)
        else:
            self.stop()

    def _applications(self) -> list[asyncio.Future[None]]:
        details = list(self.connections.values())
        return [d["application_instance"] for d in details if "application_instance" in d]

    def stop(self) -> None:
        """Stop the reactor, once."""
        if not reactor.running:
            super().stop()
        elif not reactor._stopped:
            reactor.stop()

    def kill_all_applications(self) -> Any:
        """Cancel running requests; the reactor's shutdown waits for this."""
        closing.mark_stopping()
        for task in self._applications():
            task.cancel()


def endpoints(addresses: Sequence[str], port: int) -> list[str]:
    """Twisted's descriptions of a TCP port on each address."""
    return [f"tcp:port={port}:interface={a.replace(':', r'\:')}" for a in addresses]


def build_server(application: Application, addresses: Sequence[str], port: int) -> ConsoleServer:
    """A server that will listen on ``port`` of each of ``addresses``."""
    return ConsoleServer(application, endpoints(addresses, port))


def exit_process(status: int) -> None:
    """Exit now: a view stuck in a thread must not delay it (threading joins threads)."""
    logging.shutdown()
    os._exit(status)
