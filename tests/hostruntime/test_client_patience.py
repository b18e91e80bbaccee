"""How long the client of the agent waits for which answer."""

from __future__ import annotations

from pathlib import Path

import httpx

from hostruntime.host.patience import scaled
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.client import HostClient


def test_a_disk_that_is_copied_may_take_its_time(tmp_path: Path) -> None:
    """To start from a snapshot copies as much as to take it: ten minutes, not one."""
    waits: dict[str, float] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        what = "image" if b'"snapshot":null' in request.content else "snapshot"
        waits[what] = request.extensions["timeout"]["read"]
        begun = {"id": "sbx", "image": "i", "state": "running", "started_at": 1.0, "boot_ms": 1.0}
        return httpx.Response(201, json={**begun, "deadline": None})

    client = HostClient(tmp_path / "host.sock")
    client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://host")
    client.create_sandbox(CreateSandbox("sbx", image="i", cpu=1, memory_mb=64))
    client.create_sandbox(CreateSandbox("sbx", snapshot="s", cpu=1, memory_mb=64))
    assert round(waits["snapshot"] / waits["image"]) == 10


def test_an_agent_that_is_to_wait_and_then_says_nothing_is_given_up(tmp_path: Path) -> None:
    """It may be stopped: whoever listens does not listen for ever."""
    waits: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        waits.append(request.extensions["timeout"]["read"])
        return httpx.Response(200, json={"run": "r", "seq": 0, "whole": True, "sandboxes": []})

    client = HostClient(tmp_path / "host.sock")
    client._http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://host")
    client.changes("r", 0, seconds=7.5)
    assert scaled(7.5) < waits[0] <= scaled(15)
