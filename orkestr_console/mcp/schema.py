"""The definitions of tools, as small as they can be: an agent reads all of them in each session.

``CHARACTERS_PER_TOKEN`` is the usual estimate for English and JSON. Models differ, but not by so
much that a budget would be of no use.
"""

from __future__ import annotations

import json
from typing import Any

CHARACTERS_PER_TOKEN = 4
# Of all tools together, and of each answer that is a list.
MAX_DEFINITIONS_TOKENS, MAX_LIST_TOKENS = 4_000, 2_000
NULL = {"type": "null"}
# What says nothing: what nobody would pass is refused anyway.
NOISE = (
    ("default", None),
    ("default", False),
    ("description", ""),
    ("minimum", 0),
    ("minimum", 1),
    ("minLength", 1),
    ("minItems", 1),
)


def compact(value: Any) -> str:
    """JSON without blanks."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def tokens(text: str) -> int:
    """An estimate of how many tokens a model needs for a text."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def input_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool's schema without what callers don't need: titles, null for what can be left out."""
    definitions = schema.get("$defs", {})
    properties = {
        name: argument(described, definitions) for name, described in schema["properties"].items()
    }
    required = {"required": schema["required"]} if schema.get("required") else {}
    return {"type": "object", "properties": properties, **required}


def argument(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of an argument, or of what is in one."""
    if reference := schema.get("$ref"):
        schema = {**definitions[reference.rpartition("/")[2]], **schema}
    if options := [one for one in schema.get("anyOf", ()) if one != NULL]:
        schema = {**schema, **options[0]}
    small = {
        name: value
        for name, value in schema.items()
        if name not in {"title", "anyOf", "$ref"} and (name, value) not in NOISE
    }
    if small.get("additionalProperties") is False:
        # A model: its docstring is ours, not the caller's.
        del small["additionalProperties"]
        small.pop("description", None)
    if "properties" in small:
        inner = small["properties"].items()
        small["properties"] = {name: argument(one, definitions) for name, one in inner}
    if "items" in small:
        small["items"] = argument(small["items"], definitions)
    return small
