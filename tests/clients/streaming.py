"""Reading server-sent events as a browser's EventSource does (HTML Living Standard, 9.2.6)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from tests.stack import Stack


def events_of(
    stack: Stack, template: str, *, last_event_id: int | None = None
) -> Iterator[dict[str, Any]]:
    """The events of a build as they come; each has been checked against its own frame."""
    headers = {"Authorization": f"Bearer {stack.api_key}"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    url = f"{stack.url}/v1/templates/{template}/events"
    params = {"follow": "true"}
    with httpx.stream(
        "GET", url, params=params, headers=headers, trust_env=False, timeout=60
    ) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "text/event-stream"
        yield from frames(answer.iter_lines())


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The frames of a stream, parsed."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            assert name in {"id", "event", "data", "retry"}, line
            fields[name] = value
            continue
        if "data" in fields:
            event: dict[str, Any] = json.loads(fields["data"])
            assert (fields["id"], fields["event"]) == (str(event["seq"]), event["kind"])
            yield event
        fields = {}
