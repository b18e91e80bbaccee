"""JSON Schema (2020-12, as in OpenAPI 3.1) of what is sent and answered."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

REFERENCE = "#/components/schemas/{model}"


class Untitled(GenerateJsonSchema):
    """Without a title for each field, which would repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False

    def typed_dict_schema(self, schema: core_schema.TypedDictSchema) -> dict[str, Any]:
        """Answers can get further members: clients ignore those that they don't know."""
        found = super().typed_dict_schema(schema)
        found.pop("additionalProperties", None)
        return found


def schemas(types: Iterable[Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The schema of each type, and the components that they refer to."""
    inputs = [(number, "validation", TypeAdapter(each)) for number, each in enumerate(types)]
    found, rest = TypeAdapter.json_schemas(
        inputs,  # type: ignore[arg-type]
        ref_template=REFERENCE,
        schema_generator=Untitled,
    )
    components = {name: plain(schema) for name, schema in rest.get("$defs", {}).items()}
    return [plain(found[number, "validation"]) for number, *_ in inputs], components


def plain(value: Any) -> Any:
    """With Markdown's code spans instead of reStructuredText's."""
    if isinstance(value, dict):
        return {
            name: prose(each) if name == "description" and isinstance(each, str) else plain(each)
            for name, each in value.items()
        }
    return [plain(each) for each in value] if isinstance(value, list) else value


def prose(text: str) -> str:
    """A docstring's text in Markdown, with its paragraphs on a line each."""
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
