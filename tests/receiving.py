"""A receiver of webhooks on this machine's loopback, for tests: it notes what it gets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from orkestr import verify_webhook_signature
from pytest_django import Settings

from hostruntime.network.policy import deny_list, parse_networks

LOOPBACK = ("127.0.0.0/8",)


@dataclass(frozen=True)
class Got:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> str:
        return self.headers["X-Orkestr-Event"]

    @property
    def delivery(self) -> str:
        return self.headers["X-Orkestr-Delivery"]

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.body)
        return value

    @property
    def object(self) -> str:
        data = self.json["data"]
        return str(data.get("sandbox_id") or data.get("template_id") or data.get("webhook_id"))

    def is_signed_with(self, secret: str) -> bool:
        """As the official SDK checks it."""
        header = self.headers.get("X-Orkestr-Signature")
        return bool(verify_webhook_signature(secret, self.body, header))


@dataclass
class Receiver:
    """A server, and what it does with each request: ``answer`` returns the status to send."""

    url: str = ""
    got: list[Got] = field(default_factory=list)
    answer: Callable[[Got], int] = lambda _: 204

    def events(self) -> list[str]:
        return [one.event for one in self.got]

    def wait_for(self, count: int, seconds: float = 30) -> list[Got]:
        """Until there are so many requests."""
        deadline = time.monotonic() + seconds
        while len(self.got) < count:
            assert time.monotonic() < deadline, f"{self.events()} after {seconds} s"
            time.sleep(0.02)
        return list(self.got)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests want."""


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver for the length of a block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got = Got(self.path, dict(self.headers), body)
            status = receiver.answer(got)
            receiver.got.append(got)
            self.send_response(status)
            self.send_header("Location", f"{receiver.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            """Nobody reads it."""

    server = Server(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def talking(script: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what ``script`` does to each connection; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=attend, args=(connection,), daemon=True).start()

        def attend(connection: socket.socket) -> None:
            with connection:
                try:
                    script(connection)
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def loopback_permitted(settings: Settings) -> None:
    """As with ``ORKESTR_WEBHOOK_PERMIT=127.0.0.0/8``, which only tests set."""
    settings.WEBHOOK_DENIED = deny_list((), LOOPBACK)
    settings.WEBHOOK_PERMITTED = parse_networks(LOOPBACK)
