"""What is said of a package index that does not answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from orkestr_console.runner import package_index
from orkestr_console.runner.package_index import shown, trouble
from tests.stack import free_port


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@contextmanager
def index_that_answers(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing: the test's output is the test's."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/simple"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 403, 404])
def test_one_that_answers_is_well_whatever_it_has(status: int) -> None:
    with index_that_answers(status) as index:
        assert trouble(index) is None


def test_one_that_fails_is_told_of_with_its_status() -> None:
    with index_that_answers(503) as index:
        assert trouble(index) == "answers 503 Service Unavailable"


def test_one_where_nobody_listens_refuses() -> None:
    assert trouble(f"http://127.0.0.1:{free_port()}/simple") == "refuses connections"


def test_one_that_hangs_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        assert trouble(index, 0.3) == "does not answer within 0 s"


def test_a_name_that_cannot_be_resolved_is_dns() -> None:
    """In a network namespace without a network, so that nobody is asked."""
    asked = ["unshare", "--net", sys.executable, package_index.__file__]
    given = {"PIP_INDEX_URL": "https://somebody:secret@index.example/simple", "NO_PROXY": "*"}
    done = subprocess.run(asked, env=given, capture_output=True, text=True, check=True)
    said = "the package index https://index.example/simple cannot be found: the name index.example"
    assert done.stdout.startswith(said)
    assert "(DNS)" in done.stdout


def test_a_login_is_not_shown() -> None:
    assert shown("https://a:b@index.example:8443/simple") == "https://index.example:8443/simple"
