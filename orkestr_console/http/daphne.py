"""Daphne with back-pressure, body limits and a clean shutdown.

Stock Daphne buffers whatever a view sends until the client has read it, and whatever a client sends
until the view has read it. Here

* a view that sends faster than the client reads has to wait, and a client that reads nothing for
  ``STALL_TIMEOUT`` is disconnected;
* a body over the limit is refused with 413 as soon as its length is known or exceeded, and one
  below it waits in a file until the application reads it; an upload's is read from the connection
  (:mod:`orkestr_console.http.uploads`);
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
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

# First: it installs the asyncio reactor that everything of Twisted below then finds.
from daphne.server import Server, twisted_loop  # isort: skip
from daphne.http_protocol import (
    HEADER_NAME_RE,
    INVALID_HEADER_VALUE_BYTES,
    HTTPFactory,
    WebRequest,
)
from daphne.http_protocol import http as twisted_http
from daphne.ws_protocol import WebSocketFactory, WebSocketProtocol
from django.conf import settings
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from twisted.logger import globalLogBeginner
from zope.interface import implementer

from hostruntime.host.patience import scaled
from orkestr_console.core.addresses import MCP_PATH
from orkestr_console.core.errors import (
    DomainError,
    Internal,
    InvalidInput,
    PayloadTooLarge,
    rpc_error,
)
from orkestr_console.core.ids import new_id
from orkestr_console.http import closing, interim, straight, uploads
from orkestr_console.http.headers import API_HEADERS, REQUEST_ID_HEADER
from orkestr_console.http.processes import Place
from orkestr_console.http.sharing import SharedPort
from orkestr_console.http.straight import STALL_TIMEOUT

reactor: Any = installed_reactor
begin_logging: Callable[..., None] = globalLogBeginner.beginLoggingTo
# Twisted's own log has a line for every request.
NO_OBSERVERS: list[Callable[[object], None]] = [lambda _: None]
logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
GRACE_SECONDS = 4.0
# How long requests that were cut off then may take to record that.
LAST_SECONDS = 3.0
# How long a refused client may keep sending before it is disconnected, so that it can read the
# reason: closing a socket with unread data makes the kernel discard the response (RFC 9112,
# section 9.6).
LINGER_SECONDS = 2.0
CHUNK_BYTES = 64 * 1024
SERVICE_RESTART = 1012  # RFC 6455, section 7.4.2, and its registry

PATH_PROBLEM = "Invalid characters in path"
MALFORMED = "This is not a valid HTTP/1.1 request."
ABSOLUTE_FORM = re.compile(rb"https?://(?P<host>[^/?]+)", re.IGNORECASE)

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

    path: bytes
    uri: bytes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Django parses forms.
        super().__init__(*args, **kwargs, parsePOSTFormSubmission=False)
        self.backpressure = Backpressure()
        self._received = 0
        self._refused = False
        self._interim: Any = None
        self.upload: uploads.UploadBody | None = None

    def gotLength(self, length: int | None) -> None:  # noqa: N802 - Twisted's name
        """The headers are in; ``length`` is None for a chunked body."""
        if self.channel._command == b"PUT" and self._begins_upload():
            self._process()
            return
        super().gotLength(length)
        if length is not None and length > settings.LARGEST_BODY:
            self._refuse()

    def _begins_upload(self) -> bool:
        """Whether the body is an upload's, which then comes while the request is served."""
        # What requestReceived() sets once the body is complete.
        self.method, self.uri = self.channel._command, self.channel._path
        self.clientproto, self.path = self.channel._version, self.uri.partition(b"?")[0]
        self._take_origin_form()
        if not uploads.is_upload(self.method, self.path):
            return False
        self.content = io.BytesIO()
        expects = self.getHeader(b"expect") is not None
        # Twisted would answer it at once, and the view has not been asked yet.
        self.requestHeaders.removeHeader(b"expect")
        self.upload = uploads.UploadBody(self.channel, expects=expects)
        return True

    def handleContentChunk(self, data: bytes) -> None:  # noqa: N802 - Twisted's name
        """A piece of the body, in any transfer encoding."""
        if self.upload is not None:
            self.upload.feed(data)
            return
        self._received += len(data)
        if self._received > settings.LARGEST_BODY and not self._refused:
            self._refuse()
        if not self._refused:
            super().handleContentChunk(data)

    def requestReceived(self, *args: bytes) -> None:  # noqa: N802 - Twisted's name
        """The body is complete."""
        if self.upload is not None:
            self.upload.end()
        elif not self._refused:
            super().requestReceived(*args)

    def process(self) -> Any:
        """Start the request, without the client's ``Daphne-Root-Path`` header.

        Daphne accepts it from anybody, and every link would start with it.
        """
        self.requestHeaders.removeHeader(b"daphne-root-path")
        self._take_origin_form()
        answer = interim.interim_answer(
            protocol=self.clientproto,
            path=self.path,
            agent=self.getHeader(b"user-agent") or b"",
            connection=self.getHeader(b"connection") or b"",
        )
        if answer is not None and settings.INTERIM_ANSWERS:
            self._interim = reactor.callLater(interim.INTERIM_SECONDS, self._send_interim, answer)
        if self.requestHeaders.hasHeader(b"upgrade"):
            return super().process()
        return self._process()

    def _take_origin_form(self) -> None:
        """Have a target that a client writes for proxies be what it stands for.

        A server accepts it from anybody, and goes by its host (RFC 9112, section 3.2.2).
        """
        if absolute := ABSOLUTE_FORM.match(self.uri):
            self.requestHeaders.setRawHeaders(b"host", [absolute["host"]])
            rest = self.uri[absolute.end() :]
            self.uri = rest if rest.startswith(b"/") else b"/" + rest
            self.path = self.uri.partition(b"?")[0]

    def _process(self) -> None:
        """Daphne's own for a request that is no WebSocket's, without its detours."""
        headers = list(self.requestHeaders.getAllRawHeaders())
        if problem := request_problem(self.path, self.uri, headers):
            if problem == PATH_PROBLEM:
                self.path = b"/"
            self.basic_error(400, b"Bad Request", problem)
            return
        self.request_start = time.time()
        self.client_addr = [self.client.host, self.client.port]
        self.server_addr = [self.host.host, self.host.port]
        self.content.seek(0, 0)
        scope = {
            "type": "http",
            "http_version": self.clientproto.partition(b"/")[2].decode("ascii"),
            "method": self.method.decode("ascii"),
            "path": unquote(self.path.decode("ascii")),
            "raw_path": self.path,
            "root_path": "",
            "scheme": "https" if self.isSecure() else "http",
            "query_string": self.uri.partition(b"?")[2],
            # One with an underscore would look like another's (CVE-2015-0219).
            "headers": [
                (name.lower(), value)
                for name, values in headers
                if b"_" not in name
                for value in values
            ],
            "client": self.client_addr,
            "server": self.server_addr,
        }
        self.application_queue = self.server.create_application(self, scope)

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
        error = PayloadTooLarge(settings.LARGEST_BODY)
        path = self.channel._path.partition(b"?")[0].decode("ascii", "replace")
        # A client of MCP reads no other form.
        wire = rpc_error(error) if path.rstrip("/") == MCP_PATH else error.to_wire()
        transport.write(error_response(error, wire))
        close_slowly(transport)

    def handle_reply(self, message: Message) -> None:
        """Send a piece of the response; the first one registers for back-pressure."""
        self._cancel_interim()
        starts = message["type"] == "http.response.start"
        if starts and not self.finished and self.channel is not None and self.producer is None:
            self.registerProducer(self.backpressure, streaming=True)
            if self.upload is not None and not self.upload.complete:
                self.responseHeaders.setRawHeaders(b"connection", [b"close"])
        super().handle_reply(message)

    def finish(self) -> None:
        """The response is complete."""
        if self.producer is not None:
            self.unregisterProducer()
        if self.responseHeaders.hasHeader(b"connection") and self.upload is not None:
            self._finish_connection(self.channel, self.upload)
        super().finish()

    def _finish_connection(self, channel: Any, upload: uploads.UploadBody) -> None:
        """Have the connection end with the response, which came before the upload's end."""
        channel.persistent = False
        if not upload.complete:
            # What still comes is no other request.
            channel.dataReceived = lambda _: None
            channel.loseConnection = partial(close_slowly, channel.transport)

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


class BoundedChannel(twisted_http.HTTPChannel):  # type: ignore[misc]
    """A connection on which what is no HTTP gets an error like all others."""

    def _respondToBadRequestAndDisconnect(self) -> None:  # noqa: N802 - Twisted's name
        self.transport.write(error_response(InvalidInput(MALFORMED)))
        self.loseConnection()


class BoundedHTTPFactory(HTTPFactory):  # type: ignore[misc]
    """Creates channels whose requests are bounded."""

    @staticmethod
    def protocol() -> Any:
        """What Twisted makes for each connection, with a channel of ours."""
        return twisted_http._GenericHTTPChannelProtocol(BoundedChannel())

    def log(self, request: Any) -> None:
        """Format no line for an access log that nobody keeps."""

    def buildProtocol(self, addr: Any) -> Any:  # noqa: N802 - Twisted's name
        """One protocol for each connection."""
        protocol = super().buildProtocol(addr)
        protocol.requestFactory = BoundedRequest
        return protocol


def request_problem(
    path: bytes, uri: bytes, headers: Sequence[tuple[bytes, Sequence[bytes]]]
) -> str:
    """What is wrong with a request's address or headers, in Daphne's words; blank if nothing."""
    for name, values in headers:
        if not HEADER_NAME_RE.fullmatch(name):
            return "Invalid header name"
        if any(INVALID_HEADER_VALUE_BYTES.intersection(value) for value in values):
            return "Invalid header value"
    if not path.isascii():
        return PATH_PROBLEM
    return "" if uri.isascii() else "Invalid query string"


def close_slowly(transport: Any) -> None:
    """Send no more, and close once the client has had time to read what was sent."""
    transport.loseWriteConnection()
    reactor.callLater(LINGER_SECONDS, transport.abortConnection)


def error_response(error: DomainError, wire: Mapping[str, Any] | None = None) -> bytes:
    """A complete HTTP response for a request that never reaches the application."""
    body, headers = error_body(error, wire)
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    status = HTTPStatus(error.status)
    head = f"HTTP/1.1 {status} {status.phrase}\r\n{fields}Connection: close\r\n\r\n"
    return head.encode() + body


def error_body(
    error: DomainError, wire: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a response that bypasses the application and its middleware."""
    body = json.dumps(error.to_wire() if wire is None else wire).encode()
    length = {"Content-Length": str(len(body)), REQUEST_ID_HEADER: new_id("req")}
    return body, {"Content-Type": "application/json", **API_HEADERS, **length}


class ConsoleServer(Server):  # type: ignore[misc]
    """Daphne with the limits of this module. ``run()`` returns when the process may end."""

    def __init__(self, application: Application, place: Place) -> None:
        super().__init__(
            application,
            # Not what Daphne would open itself.
            endpoints=["inherited"],
            signal_handlers=False,
            ping_interval=20,
            ping_timeout=30,
            websocket_max_message_size=64 * 1024,
            websocket_max_frame_size=64 * 1024,
            application_close_timeout=round(scaled(5)),
            server_name="",
        )
        self._place = place
        self._ports: list[Any] = []
        self._stopping = False

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Replaces Daphne's own, which chooses its protocols where a subclass cannot reach them.
        """
        self.connections: dict[Any, dict[str, Any]] = {}
        self._make_factories()
        begin_logging(NO_OBSERVERS, redirectStandardIO=False, discardBuffer=True)
        reactor.callLater(1, self.application_checker)
        reactor.callLater(2, self.timeout_checker)
        asyncio.set_event_loop(twisted_loop)
        self._place.load.begin(self._place.index)
        for each in self._place.sockets:
            self._listen(each)
        reactor.callWhenRunning(self._beat)
        for number in (signal.SIGTERM, signal.SIGINT):
            twisted_loop.add_signal_handler(number, self.stop_gracefully)
        reactor.addSystemEventTrigger("before", "shutdown", self.kill_all_applications)
        reactor.run(installSignalHandlers=False)

    def _listen(self, shared: socket.socket) -> None:
        """Accept connections to a socket that is listening already; this uses a copy of it."""
        adopt: Callable[..., SharedPort] = SharedPort._fromListeningDescriptor
        port = adopt(reactor, shared.fileno(), shared.family, self.http_factory)
        port.share(self._place.load, self._place.index)
        port.startListening()
        self._ports.append(port)

    def _beat(self) -> None:
        """Record that the event loop is alive, every second."""
        self._place.pulse.beat()
        reactor.callLater(HEARTBEAT_SECONDS, self._beat)

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

    def create_application(self, protocol: Any, scope: Message) -> Any:
        """Start the application for a request, with its body on demand."""
        client = scope.get("client")
        if client:
            # One socket listens for both families, and maps IPv4 clients to IPv6.
            client[0] = client[0].removeprefix("::ffff:")
        if scope["type"] != "http":
            return super().create_application(protocol, scope)
        scope.setdefault("asgi", {"version": "3.0"})
        scope[uploads.CUT_OFF_KEY] = protocol.cut_off
        scope[straight.REQUEST_KEY] = protocol
        if protocol.upload is not None:
            scope[uploads.BODY_KEY] = protocol.upload
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
        details = self.connections.get(protocol)
        if details is None or "disconnected" in details:
            return
        protocol.handle_reply(message)
        if not await protocol.backpressure.wait():
            logger.warning("disconnected a client that read nothing for %.0f s", STALL_TIMEOUT)
            protocol.cut_off()

    def stop_gracefully(self) -> None:
        """Stop accepting, let running requests finish, then stop; a second call stops at once."""
        if self._stopping:
            self.stop()
            return
        self._stopping = True
        self._place.load.end(self._place.index)
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
        """Cancel running requests; the reactor's shutdown waits until they have recorded that."""
        closing.mark_stopping()
        running = [task for task in self._applications() if not task.done()]
        for task in running:
            task.cancel()
        if not running:
            return None
        ended = asyncio.wait(running, timeout=LAST_SECONDS)
        deferred: Any = Deferred.fromFuture
        return deferred(asyncio.ensure_future(ended))


def exit_process(status: int) -> None:
    """Exit now: a view stuck in a thread must not delay it (threading joins threads)."""
    logging.shutdown()
    os._exit(status)
