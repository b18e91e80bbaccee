"""The document as pages show it: groups of calls, and the fields of what they take and answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from http import HTTPStatus
from typing import Any

from orkestr_console.http.describing import JSON
from orkestr_console.openapi.document import document

# A field in a field in a field; deeper ones are few, and their parents say what they are.
DEEPEST = 3
BOUNDS = {
    "default": "default {}",
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} entries",
    "maxItems": "at most {} entries",
    "maxProperties": "at most {} entries",
    "contentEncoding": "in {}",
}


@dataclass(frozen=True)
class Field:
    """A field or parameter. In an object in ``a`` its name is ``a.b``, and in a list ``a[].b``."""

    name: str
    kind: str
    about: str
    required: bool = False
    bounds: str = ""
    values: tuple[str, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Answer:
    """What a call answers with one status: ``media`` names types, and ``fields`` are JSON's."""

    status: int
    phrase: str
    about: str
    media: tuple[str, ...]
    fields: tuple[Field, ...]
    items: tuple[Field, ...]


@dataclass(frozen=True)
class Refusal:
    """A status with which a call is refused, and the codes of its errors."""

    status: int
    phrase: str
    codes: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """An example in one language."""

    label: str
    source: str


@dataclass(frozen=True)
class ShownCall:
    """A call. ``name`` is its own in all of the document."""

    name: str
    method: str
    path: str
    summary: str
    notes: str
    scope: str
    extension: bool
    parameters: tuple[Field, ...]
    body: tuple[Field, ...]
    answers: tuple[Answer, ...]
    refusals: tuple[Refusal, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ShownGroup:
    """Calls that belong together."""

    name: str
    about: str
    calls: tuple[ShownCall, ...]

    @property
    def slug(self) -> str:
        """Its name in the address of its page."""
        return self.name.lower()


@cache
def groups() -> tuple[ShownGroup, ...]:
    """All groups, in the order of the document."""
    made: dict[str, list[ShownCall]] = {}
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            for tag in operation["tags"]:
                made.setdefault(tag, []).append(shown_call(method.upper(), path, operation))
    return tuple(
        ShownGroup(tag["name"], tag["description"], tuple(made[tag["name"]]))
        for tag in document()["tags"]
    )


def shown_call(method: str, path: str, operation: Mapping[str, Any]) -> ShownCall:
    """One of them."""
    content = operation.get("requestBody", {}).get("content", {})
    said = operation["responses"].items()
    return ShownCall(
        name=operation["operationId"],
        method=method,
        path=path,
        summary=operation["summary"],
        notes=operation.get("description", ""),
        scope=next((scope for need in operation["security"] for scope in need["token"]), ""),
        extension=operation.get("x-extension", False),
        parameters=tuple(parameter(each) for each in operation.get("parameters", ())),
        body=tuple(fields(content.get(JSON, {}).get("schema", {}))),
        answers=tuple(answer(int(code), each) for code, each in said if "$ref" not in each),
        refusals=tuple(refusal(int(code), each) for code, each in said if "$ref" in each),
        samples=tuple(Sample(each["label"], each["source"]) for each in operation["x-codeSamples"]),
    )


def parameter(described: Mapping[str, Any]) -> Field:
    """A parameter of the address, the query string or the header."""
    schema = described["schema"]
    name = described["name"]
    if described.get("style") == "deepObject":
        name = f"{name}[…]"
    about = described.get("description", "")
    shown = field(name, schema, required=described.get("required", False), about=about)
    return replace(shown, where=described["in"])


def answer(status: int, described: Mapping[str, Any]) -> Answer:
    """An answer to a call that was made."""
    content = described.get("content", {})
    streams = [each["x-itemSchema"] for each in content.values() if "x-itemSchema" in each]
    about = described["description"]
    phrase = HTTPStatus(status).phrase
    return Answer(
        status,
        phrase,
        "" if about == phrase else about,
        tuple(content),
        tuple(fields(content.get(JSON, {}).get("schema", {}))),
        tuple(fields(streams[0])) if streams else (),
    )


def refusal(status: int, described: Mapping[str, Any]) -> Refusal:
    """A refusal, which is a reference."""
    content = resolved(described)["content"][JSON]
    return Refusal(status, HTTPStatus(status).phrase, tuple(content["examples"]))


def fields(schema: Mapping[str, Any], prefix: str = "", depth: int = 1) -> Iterator[Field]:
    """The fields of an object, each followed by its own; of alternatives, all, each name once."""
    seen = set()
    for alternative in alternatives(schema):
        required = alternative.get("required", ())
        for name, value in alternative.get("properties", {}).items():
            if name in seen:
                continue
            seen.add(name)
            full = prefix + name
            yield field(full, value, required=name in required)
            if depth < DEEPEST:
                inner, suffix = content_of(value)
                yield from fields(inner, f"{full}{suffix}.", depth + 1)


def field(name: str, schema: Mapping[str, Any], *, required: bool, about: str = "") -> Field:
    """One field."""
    main = next(iter(alternatives(schema)), {})
    limits = {**main, **schema}
    bounds = [
        words.format(limits[name] if isinstance(limits[name], str) else json.dumps(limits[name]))
        for name, words in BOUNDS.items()
        if limits.get(name) is not None and limits[name] != ""
    ]
    return Field(
        name,
        kind(schema),
        about or schema.get("description", "") or own_words(main),
        required,
        ", ".join(bounds),
        tuple(str(value) for value in limits.get("enum", ())),
    )


def own_words(schema: Mapping[str, Any]) -> str:
    """What a schema that is no component says of itself: a component's is not about the field."""
    return "" if "title" in schema else str(schema.get("description", ""))


def kind(schema: Mapping[str, Any]) -> str:
    """The type in a word or two."""
    names = []
    for each in alternatives(schema, nulls=True):
        name = each.get("type", "any")
        if name == "array":
            name = f"list of {kind(each.get('items', {}))}"
        elif each.get("format") == "date-time":
            name = "time"
        elif name == "integer":
            name = "whole number"
        names += [name] if name not in names else []
    return " or ".join(names)


def content_of(schema: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What is in a field that is an object or has some, and what its name ends in there."""
    for each in alternatives(schema):
        if each.get("type") == "array":
            inner, suffix = content_of(each.get("items", {}))
            return inner, f"[]{suffix}"
        if isinstance(each.get("additionalProperties"), dict):
            inner, suffix = content_of(each["additionalProperties"])
            return inner, f"[…]{suffix}"
    return schema, ""


def alternatives(schema: Mapping[str, Any], *, nulls: bool = False) -> Iterable[Mapping[str, Any]]:
    """The schemas of which a value has one, without references; without null unless asked for."""
    schema = resolved(schema)
    if "anyOf" in schema:
        return [
            inner
            for each in schema["anyOf"]
            for inner in alternatives(each, nulls=nulls)
            if nulls or inner.get("type") != "null"
        ]
    return [schema]


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a reference stands for."""
    while "$ref" in schema:
        _, _, kind_of, name = schema["$ref"].split("/")
        schema = document()["components"][kind_of][name]
    return schema
