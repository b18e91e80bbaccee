"""The examples of the reference: each one makes the call that it is for."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import pytest
from click import Context
from orkestr import OrkestrClient
from orkestr_cli.main import cli

from orkestr_console.http.describing import JSON
from orkestr_console.openapi.calls import Call, calls
from orkestr_console.openapi.samples import COMMAND_LINE, PYTHON, filled, samples
from orkestr_console.openapi.shown import resolved
from tests.api.describing import operation

CALLS = {call.name: call for call in calls()}
VALUES = {"string": "QQ==", "integer": 1, "number": 1.0, "boolean": False, "null": None}
MOMENT = "2026-12-01T00:00:00.000Z"


def instance(schema: Mapping[str, Any]) -> Any:
    """A value that a schema describes: lists have one entry, and the first alternative counts."""
    schema = resolved(schema)
    if "anyOf" in schema:
        return instance(schema["anyOf"][0])
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("format") == "date-time":
        return MOMENT
    if schema.get("type") == "array":
        return [instance(schema["items"])]
    if schema.get("type") == "object":
        return {name: instance(each) for name, each in schema.get("properties", {}).items()}
    return VALUES[schema.get("type", "null")]


def described_answer(method: str, path: str) -> Any:
    """What the document says of a call's answer, as a value."""
    found = operation(method, path)
    assert found, f"{method} {path} is not described"
    said = next(each for status, each in found[1]["responses"].items() if status < "300")
    return instance(said["content"][JSON]["schema"]) if "content" in said else None


def address(call: Call) -> re.Pattern[str]:
    return re.compile(re.sub(r"{[a-z_]+}", "[^/]+", call.path))


@pytest.mark.parametrize("name", PYTHON)
def test_the_official_sdk_makes_this_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def request(client: Any, method: str, path: str, **_: Any) -> Any:
        asked.append((method, path))
        answer = described_answer(method, path)
        # The one page is the last.
        return {**answer, "next_cursor": None} if isinstance(answer, dict) else answer

    monkeypatch.setenv("ORKESTR_API_KEY", "ork_x")
    monkeypatch.setattr(OrkestrClient, "request", request)
    call = CALLS[name]
    assert call.operation
    shown = samples(call, call.operation)
    source = next(each["source"] for each in shown if each["lang"] == "python")
    exec(compile(source, name, "exec"), {})
    made = [path for method, path in asked if method == call.method]
    assert any(address(call).fullmatch(path) for path in made), asked


@pytest.mark.parametrize("name", COMMAND_LINE)
def test_the_official_command_line_takes_it(name: str) -> None:
    program, *words = shlex.split(filled(COMMAND_LINE[name]))
    assert program == "orkestr"
    group: Any = cli
    context = Context(cli)
    while hasattr(group, "resolve_command"):
        _, group, words = group.resolve_command(context, words)
        context = Context(group, context)
    # Raises UsageError for an option or argument that it doesn't have.
    group.make_context(name, words)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_each_call_has_one_for_curl(call: Call) -> None:
    assert call.operation
    words = shlex.split(samples(call, call.operation)[0]["source"].replace("\\\n", ""))
    assert words[0] == "curl"
    url = next(word for word in words if word.startswith("$ORKESTR_BASE_URL"))
    path = url.removeprefix("$ORKESTR_BASE_URL").partition("?")[0]
    assert address(call).fullmatch(path)
    assert "{" not in path, "add an example of the parameter to samples.IDS"
