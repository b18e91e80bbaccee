"""What a client that waits long for an answer hears meanwhile, from the real server."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from orkestr_console.http.interim import CONTINUE, PROCESSING, interim_answer
from tests.stack import free_port, wait_for

TREE = Path(__file__).resolve().parents[2]
SDK = b"orkestr-python/0.6.3"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where a server answers that says every 0.2 s that the answer still comes."""
    number = free_port()
    command = [sys.executable, "-m", "tests.services.slow_server", str(number), "0.2"]
    server = subprocess.Popen(command, cwd=TREE, stdin=subprocess.DEVNULL)

    def answers() -> bool:
        assert server.poll() is None
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{number}/v1/x?0", trust_env=False).is_success
        return False

    wait_for(answers, 30, lambda: "")
    yield number
    server.kill()
    server.wait()


def raw(port: int, requests: str, answers: int) -> bytes:
    """All that is answered to requests on one connection, until so many are."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(requests.replace("\n", "\r\n").encode())
        while said.count(b"done") < answers and (part := connection.recv(65536)):
            said += part
    return said


def test_a_client_with_little_patience_waits_as_long_as_it_takes(port: int) -> None:
    """As the official SDK, whose patience is 30 s and whose name this is."""
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"User-Agent": SDK.decode()},
        timeout=0.6,
        trust_env=False,
    ) as client:
        for _ in range(2):  # On the same connection.
            assert client.post("/v1/x?1800", json={}).text == "done"
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/x?1800", json={}, headers={"User-Agent": "unknown"})


def test_a_client_that_skips_no_102_is_told_to_continue(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=0.6)
    for _ in range(2):
        connection.request("POST", "/v1/x?1500", headers={"User-Agent": "python-requests/2.32"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"done")
    connection.close()


def test_an_answer_that_is_soon_there_is_alone(port: int) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        assert client.post("/v1/x?0").text == "done"
    host = f"Host: x\nUser-Agent: {SDK.decode()}\n"
    said = raw(port, f"GET /v1/x?0 HTTP/1.1\n{host}\nGET /v1/x?500 HTTP/1.1\n{host}\n", 2)
    # The second only once the first has been answered.
    assert said.startswith(b"HTTP/1.1 200")
    first, *interim, second = said.split(b"HTTP/1.1 ")[1:]
    assert first.endswith(b"done")
    assert second.startswith(b"200")
    assert second.endswith(b"done")
    assert interim == [b"102 Processing\r\n\r\n"] * 2


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, PROCESSING),
        ({"agent": b"python-httpx/0.28.1"}, PROCESSING),
        ({"agent": b"Python/3.12 aiohttp/3.9"}, PROCESSING),
        ({"agent": b"curl/7.88.1"}, PROCESSING),
        ({"agent": b"node"}, PROCESSING),
        ({"agent": b"python-requests/2.32.0"}, CONTINUE),
        ({"agent": b"Python-urllib/3.12"}, CONTINUE),
        ({"agent": b"python-urllib3/2.2"}, CONTINUE),
        ({"agent": b"Go-http-client/1.1"}, None),
        ({"agent": b""}, None),
        ({"protocol": b"HTTP/1.0"}, None),
        ({"path": b"/templates/"}, None),
        ({"connection": b"close"}, None),
    ],
)
def test_who_hears_what(changes: dict[str, bytes], answer: bytes | None) -> None:
    asked = {
        "protocol": b"HTTP/1.1",
        "path": b"/v1/sandboxes",
        "agent": SDK,
        "connection": b"keep-alive",
    }
    assert interim_answer(**(asked | changes)) == answer
