"""What the ASGI handler does for a client that disconnects early."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import Future, wait
from typing import Any

import pytest
from django.http import HttpRequest
from django.test import Client

from orkestr_console.http.handler import Handler
from orkestr_console.http.json_api import read_json
from tests.api.test_sandboxes_exec import exec_scope
from tests.fakes.host import FakeHost


def delay_reading(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on, a view reads its body only once the event is set."""
    gone = threading.Event()

    def waiting(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        assert gone.wait(20)
        return read_json(request, *args, **kwargs)

    monkeypatch.setattr("sandboxes_app.api.read_json", waiting)
    return gone


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
@pytest.mark.parametrize("stream", [False, True])
def test_a_command_whose_client_has_gone_before_it_began_is_not_run(
    api: Client,
    key: str,
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    begun: list[object] = []
    for name in ("exec_to_completion", "exec_frames"):
        monkeypatch.setattr(host, name, lambda *args, **kwargs: begun.append(args))
    created = api.post("/v1/sandboxes", {"template": "debian-12"}, "application/json")
    client_has_gone = delay_reading(monkeypatch)
    body = json.dumps({"command": "sleep 60", "stream": stream}).encode()

    async def leave_early() -> None:
        handler = Handler()
        parts: list[Future[Any]] = []
        submit = handler._threads.parts.submit

        def submitting(*args: Any) -> Future[Any]:
            parts.append(submit(*args))
            return parts[-1]

        monkeypatch.setattr(handler._threads.parts, "submit", submitting)
        scope = exec_scope(created.json()["id"], key, body)
        to_server: asyncio.Queue[Any] = asyncio.Queue()
        from_server: asyncio.Queue[Any] = asyncio.Queue()
        await to_server.put({"type": "http.request", "body": body})
        await to_server.put({"type": "http.disconnect"})
        async with asyncio.timeout(20):
            await handler(scope, to_server.get, from_server.put)
            client_has_gone.set()
            await asyncio.to_thread(wait, parts, 20)
        assert len(parts) == 1

    asyncio.run(leave_early())
    assert begun == []
    # The body could still be read: nothing was wrong.
    assert [record.getMessage() for record in caplog.records] == []
