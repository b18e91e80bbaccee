"""The OpenAPI document: whole, valid, and of what there is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from django.test import Client
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel

from orkestr_console.http.json_api import read_json
from orkestr_console.openapi import samples
from orkestr_console.openapi.calls import Call, calls
from orkestr_console.openapi.document import document, missing
from tests.api.asking import refusal

CALLS = list(calls())


def test_every_call_is_described() -> None:
    assert missing() == [], "\n".join(missing())


def test_the_document_is_valid_and_names_each_call_once() -> None:
    problems = [str(each)[:500] for each in OpenAPIV31SpecValidator(document()).iter_errors()]
    assert problems == []
    names = [call.name for call in CALLS]
    assert sorted(names) == sorted(set(names))
    assert set(samples.PYTHON) | set(samples.COMMAND_LINE) <= set(names)


def specs(call: Call) -> set[type[BaseModel]]:
    """The specs that the code of a view reads a body with."""
    found = set()
    view = inspect.unwrap(call.view)
    named = [view, *(vars(inspect.getmodule(view))[name] for name in FIRST.get(call.name, ()))]
    for function in named:
        names = function.__globals__
        used = [names.get(name) for name in function.__code__.co_names]
        if read_json in used:
            found |= {one for one in used if inspect.isclass(one) and issubclass(one, BaseModel)}
    return found


# Views whose bodies are read by what comes before them.
FIRST = {"exec_command": ("begin_command",), "run_code": ("begin_code",)}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_what_a_view_reads_is_what_is_described(call: Call) -> None:
    operation = call.operation
    assert operation
    assert specs(call) == ({operation.body} if operation.body else set())
    if operation.body is not None:
        assert operation.example, "give an example of the body"
        operation.body.model_validate(operation.example)


def test_anybody_gets_the_document_and_only_a_new_one_again(anonymous_api: Client) -> None:
    answer = anonymous_api.get("/v1/openapi.json")
    assert answer.status_code == 200
    assert answer.json()["openapi"] == "3.1.1"
    assert len(answer.content) < 300_000
    same = anonymous_api.get("/v1/openapi.json", headers={"If-None-Match": answer.headers["ETag"]})
    assert (same.status_code, same.content) == (304, b"")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("statuz=running", "statuz"),
        ("limit=1&limit=2", "limit"),
        ("metadata=x", "metadata"),
        ("metadata[]=x", "metadata[]"),
    ],
)
def test_a_parameter_that_the_call_does_not_have_is_not_ignored(
    api: Client, query: str, named: str
) -> None:
    said: dict[str, Any] = refusal(api.get(f"/v1/sandboxes?{query}"), 400, "invalid_request")
    assert list(said["fields"]) == [named]
