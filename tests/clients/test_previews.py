"""Previews with the official SDK, on a live installation."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from orkestr import Sandbox
from orkestr.errors import OrkestrError

from tests.clients.making import Sandboxes
from tests.clients.previewing import PORT, Visitor, start_server
from tests.stack import Stack, wait_for

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 4096
FEW_BYTES = 24 * MIB


@pytest.fixture
def public(sandboxes: Sandboxes) -> Sandbox:
    """A sandbox with a server, for everybody to see."""
    booted: Sandbox = sandboxes.boot("python-3.12-bare", network="restricted")
    start_server(booted)
    return booted


def front_pids(stack: Stack) -> list[int]:
    pid = stack.pid("previews")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def resident(stack: Stack) -> int:
    lines = "".join(Path(f"/proc/{pid}/status").read_text() for pid in front_pids(stack))
    sizes = [line.split()[1] for line in lines.splitlines() if line.startswith("VmRSS:")]
    return sum(map(int, sizes)) * 1024


def test_a_port_is_seen_from_outside(stack: Stack, sandboxes: Sandboxes, public: Sandbox) -> None:
    visitor = Visitor(stack, public.get_host(PORT))
    ulid = public.id.removeprefix("sbx_").lower()
    assert visitor.host == f"{PORT}-{ulid}.localhost:{stack.layout.preview_port}"
    assert public.preview_url(PORT) == f"https://{visitor.host}"
    answer = visitor.get("/a?b=c", Authorization=f"Bearer {stack.api_key}", Cookie="own=1").json()
    headers = dict(answer["headers"])
    assert (answer["name"], answer["target"], headers["cookie"]) == ("here", "/a?b=c", "own=1")
    assert headers["host"] == headers["x-forwarded-host"] == visitor.host
    assert headers["x-forwarded-for"] == "127.0.0.1" and "authorization" not in headers
    closed = Visitor(stack, public.get_host(PORT + 1)).get()
    assert (closed.status_code, closed.json()["code"]) == (502, "nothing_listens")
    # Events come one by one, and a body of any size at constant memory.
    with visitor.stream("/events") as events:
        assert next(events.iter_lines()) == "data: 1"
    before = resident(stack)
    sent = visitor.http.put(
        "/upload",
        content=(PIECE for _ in range(50)),
        headers={"Host": visitor.host, "Content-Length": str(50 * MIB)},
    )
    assert sent.text == hashlib.sha256(PIECE * 50).hexdigest()
    assert resident(stack) - before < FEW_BYTES
    # A neighbour's server on the same port is the neighbour's.
    other = sandboxes.boot("python-3.12-bare", network="restricted")
    start_server(other, "other")
    assert Visitor(stack, other.get_host(PORT)).get().json()["name"] == "other"
    assert visitor.get().json()["name"] == "here"
    # And the end of one ends what hangs on it.
    with visitor.stream("/events") as events:
        lines = events.iter_lines()
        assert next(lines) == "data: 1"
        ender = threading.Thread(target=public.terminate)
        ender.start()
        with pytest.raises(httpx.HTTPError):
            list(lines)
            raise httpx.ReadError("it ended")
        ender.join()
    assert visitor.get().json()["code"] == "no_such_preview"


def test_who_has_no_token_sees_nothing_and_a_visit_wakes(
    stack: Stack, sandboxes: Sandboxes
) -> None:
    options = {"preview_auth": True, "auto_resume": True, "on_timeout": "pause"}
    private = sandboxes.boot("python-3.12-bare", network="restricted", **options)
    start_server(private)
    token, visitor = private.preview_auth_token, Visitor(stack, private.get_host(PORT))
    assert visitor.get().json()["code"] == "preview_token_needed"
    assert visitor.get(**{"X-Orkestr-Preview-Token": token}).status_code == 200
    # In the address once, then as a cookie.
    signed_in = visitor.get(f"/a?ork_preview_token={token}")
    assert (signed_in.status_code, signed_in.headers["location"]) == (
        303,
        f"http://{visitor.host}/a",
    )
    cookie = signed_in.headers["set-cookie"].partition(";")[0]
    seen = visitor.get("/a", Cookie=cookie)
    assert seen.status_code == 200 and token not in seen.text and cookie not in seen.text
    strange = {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
    assert visitor.get("/a", Cookie=cookie, **strange).status_code == 401
    private.pause()
    assert visitor.get().status_code == 401
    assert Sandbox.get(private.id, client=private._client).status == "paused"
    assert visitor.get(Cookie=cookie).json()["name"] == "here"
    assert Sandbox.get(private.id, client=private._client).status == "running"
    log = (stack.layout.log / "previews.log").read_text()
    assert token not in log and cookie not in log


def test_a_sandbox_without_a_network_has_no_host(sandbox: Sandbox) -> None:
    with pytest.raises(OrkestrError, match="without a network"):
        sandbox.get_host(PORT)


@pytest.fixture
def killed(stack: Stack) -> Iterator[None]:
    """The front, killed."""
    old = stack.pid("previews")
    stack.kill("previews")
    stack.wait_until_restarted("previews", old)
    yield


def test_a_front_that_was_killed_is_back(stack: Stack, public: Sandbox, killed: None) -> None:
    visitor = Visitor(stack, public.get_host(PORT))

    def serves() -> bool:
        try:
            return visitor.get().status_code == 200
        except httpx.HTTPError:
            return False

    wait_for(serves, 60, stack.explain)
