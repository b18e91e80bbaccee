"""What the agent makes of callers that go away while they speak."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import MagicMock

import pytest

from hostruntime.agent.routes import application


async def test_a_caller_killed_while_it_sends_is_no_defect(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = MagicMock()
    arriving = iter([{"type": "http.request", "body": b"{", "more_body": True}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(arriving, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/sandboxes/sbx_one/pause"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    with caplog.at_level(logging.INFO):
        await application(host)(scope, receive, send)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "disconnected" in caplog.text
    host.sandboxes.pause.assert_not_called()
