"""``Idempotency-Key`` against the real server: a client that left comes back for its sandbox."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest

from tests.stack import Stack, wait_for


@pytest.fixture
def mark(stack: Stack) -> Iterator[str]:
    """A label; what has it is terminated afterwards."""
    mark = uuid4().hex
    yield mark
    with stack.client() as client:
        for sandbox in marked(client, mark):
            client.delete(f"/v1/sandboxes/{sandbox}")


def marked(client: httpx.Client, mark: str) -> list[str]:
    found = client.get("/v1/sandboxes", params={"metadata[mark]": mark}).json()
    return [sandbox["id"] for sandbox in found["sandboxes"]]


def test_who_left_while_a_sandbox_was_made_gets_that_one(stack: Stack, mark: str) -> None:
    body = {"template": "debian-12", "metadata": {"mark": mark}}
    headers = {"Idempotency-Key": mark}
    answers: list[httpx.Response] = []
    with stack.client() as client:
        whole = client.build_request("POST", "/v1/sandboxes", json=body, headers=headers)
        leave_when_there_is_one(client, whole, mark)

        def answered() -> bool:
            answers.append(client.post("/v1/sandboxes", json=body, headers=headers))
            return answers[-1].status_code != 409

        wait_for(answered, 30)
        last = answers[-1]
        assert (last.status_code, last.headers["Idempotent-Replayed"]) == (201, "true")
        assert marked(client, mark) == [last.json()["id"]]
        assert last.json()["status"] == "running"


def leave_when_there_is_one(client: httpx.Client, request: httpx.Request, mark: str) -> None:
    """Send a request, and disconnect as soon as its sandbox is listed, ready or not."""
    lines = [f"POST {request.url.path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items()]
    address = (request.url.host, request.url.port or 80)
    with socket.create_connection(address) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + request.read())
        wait_for(lambda: len(marked(client, mark)) == 1, 30)
