"""A tool's arguments: its own parameters, and the fields of the specs that REST reads.

A tool takes a spec as one parameter. Its callers see the spec's fields as arguments of the tool,
with the types, bounds, defaults and descriptions that the spec gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import BaseModel, create_model, model_validator
from pydantic.fields import FieldInfo


class Without:
    """Annotates a spec parameter with the fields that the tool doesn't offer."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields


class Arguments(ArgModelBase):
    """The root of the tools' argument models.

    This is where "5" becomes 5, as agents send it: the specs themselves convert nothing.
    """

    specs: ClassVar[Mapping[str, type[BaseModel]]] = {}

    @model_validator(mode="before")
    @classmethod
    def null_is_omitted(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """Agents send null for an optional argument that they leave out."""
        fields = cls.model_fields
        return {
            name: value
            for name, value in arguments.items()
            if value is not None or name not in fields or fields[name].is_required()
        }

    def model_dump_one_level(self) -> dict[str, Any]:
        """What the function is called with. Raises ``ValidationError`` for what a spec refuses."""
        values = super().model_dump_one_level()
        for parameter, spec in self.specs.items():
            # Only what was provided: some defaults depend on whether it was.
            provided = {
                name: values[name] for name in self.model_fields_set & set(spec.model_fields)
            }
            values = {
                name: value for name, value in values.items() if name not in spec.model_fields
            }
            values[parameter] = spec.model_validate(provided)
        return values


def flattened(declared: type[BaseModel]) -> type[Arguments]:
    """The model of a function's parameters, with each spec's fields in place of the spec."""
    fields: dict[str, Any] = {}
    specs: dict[str, type[BaseModel]] = {}
    for name, field in declared.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            specs[name] = annotation
            fields |= offered(annotation, field)
        else:
            fields[name] = (annotation, field)
    model = create_model(declared.__name__, __base__=Arguments, **fields)
    model.specs = specs
    return model


def offered(spec: type[BaseModel], parameter: FieldInfo) -> dict[str, Any]:
    """The fields of a spec that a tool offers, for ``create_model``."""
    omitted = {
        name for mark in parameter.metadata if isinstance(mark, Without) for name in mark.fields
    }
    return {
        name: (field.annotation, field)
        for name, field in spec.model_fields.items()
        if name not in omitted
    }
