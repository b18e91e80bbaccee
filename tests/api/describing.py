"""Whether an answer is what the OpenAPI document says: asked about every answer in these tests."""

from __future__ import annotations

import json
import re
from functools import cache, reduce
from operator import getitem
from typing import Any

import jsonschema_rs
from django.test import Client

from orkestr_console.http.describing import JSON
from orkestr_console.openapi.document import document


class DescribedClient(Client):
    """A client that compares each answer with the document."""

    def request(self, **request: Any) -> Any:
        answer = super().request(**request)
        compare(request["REQUEST_METHOD"], request["PATH_INFO"], answer)
        return answer


def compare(method: str, path: str, answer: Any) -> None:
    """Fail unless the answer's status, media type and content are described."""
    found = operation("GET" if method == "HEAD" else method, path)
    if found is None:
        return
    name, described = found
    said = described["responses"].get(str(answer.status_code))
    where = f"{method} {path}: {answer.status_code}"
    assert said is not None, f"{where} is not described at {name}"
    media = answer.headers.get("Content-Type", "").partition(";")[0]
    pointer = ("paths", name, method.lower(), "responses", str(answer.status_code))
    if "$ref" in said:
        pointer = tuple(said["$ref"].removeprefix("#/").split("/"))
        said = document()["components"]["responses"][pointer[-1]]
    content = said.get("content", {})
    if method == "HEAD" or answer.status_code == 304:
        return
    if not content:
        assert not getattr(answer, "content", b""), f"{where} has a body, and none is described"
        return
    assert media in content, f"{where} is {media or 'of no type'}; described: {', '.join(content)}"
    if media == JSON:
        check = validator((*pointer, "content", media, "schema"))
        problems = [str(each) for each in check.iter_errors(json.loads(answer.content))]
        assert not problems, f"{where} is not as described: {problems[0]}"


def compare_items_of(method: str, path: str, media: str, items: list[Any]) -> None:
    """Fail unless the items of a stream are as described."""
    found = operation(method, path)
    assert found
    content = ("paths", found[0], method.lower(), "responses", "200", "content")
    check = validator((*content, media, "x-itemSchema"))
    for item in items:
        check.validate(item)


def operation(method: str, path: str) -> tuple[str, dict[str, Any]] | None:
    """The description of a call, and its address in the document."""
    for name, pattern in patterns():
        if pattern.fullmatch(path):
            found = document()["paths"][name].get(method.lower())
            return (name, found) if found else None
    return None


@cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """The addresses, those with fewer parameters first."""
    paths = sorted(document()["paths"], key=lambda path: path.count("{"))
    return [(path, re.compile(re.sub(r"{[a-z_]+}", "[^/]+", path))) for path in paths]


@cache
def validator(pointer: tuple[str, ...]) -> jsonschema_rs.Draft202012Validator:
    """What validates the schema that is there in the document."""
    schema = reduce(getitem, pointer, document())
    components = {"components": {"schemas": document()["components"]["schemas"]}}
    return jsonschema_rs.Draft202012Validator({**schema, **components}, validate_formats=True)
