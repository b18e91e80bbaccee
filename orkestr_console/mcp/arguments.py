"""A tool's arguments: its own parameters, and the fields of the specs that REST reads.

A tool takes a spec as one parameter. Its callers see the spec's fields as arguments of the tool,
with the types, bounds, defaults and descriptions that the spec gives them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import copy
from typing import Any, ClassVar

from mcp.server.mcpserver.utilities.func_metadata import ArgModelBase
from pydantic import BaseModel, create_model, model_validator
from pydantic.fields import FieldInfo


class Without:
    """Annotates a spec parameter with the fields that the tool doesn't offer."""

    def __init__(self, *fields: str) -> None:
        self.fields = fields


class Default:
    """Annotates a spec parameter with a default that is the tool's own."""

    def __init__(self, **values: Any) -> None:
        self.values = values


class Brief:
    """Annotates a spec parameter with shorter descriptions: each session of an agent pays for them.

    A blank one is for a name that says it all.
    """

    def __init__(self, **descriptions: str) -> None:
        self.descriptions = descriptions


class Arguments(ArgModelBase):
    """The root of the tools' argument models.

    This is where "5" becomes 5, as agents send it: the specs themselves convert nothing.
    """

    specs: ClassVar[Mapping[str, type[BaseModel]]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}

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
            own = self.model_fields_set | self.defaults.keys()
            provided = {name: values[name] for name in own & set(spec.model_fields)}
            values = {
                name: value for name, value in values.items() if name not in spec.model_fields
            }
            values[parameter] = spec.model_validate(provided)
        return values


def flattened(declared: type[BaseModel]) -> type[Arguments]:
    """The model of a function's parameters, with each spec's fields in place of the spec."""
    fields: dict[str, Any] = {}
    specs: dict[str, type[BaseModel]] = {}
    defaults: dict[str, Any] = {}
    for name, field in declared.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            specs[name] = annotation
            fields |= offered(annotation, field)
            for mark in field.metadata:
                defaults |= mark.values if isinstance(mark, Default) else {}
        else:
            fields[name] = (annotation, field)
    model = create_model(declared.__name__, __base__=Arguments, **fields)
    model.specs, model.defaults = specs, defaults
    return model


def offered(spec: type[BaseModel], parameter: FieldInfo) -> dict[str, Any]:
    """The fields of a spec that a tool offers, for ``create_model``."""
    omitted: set[str] = set()
    changes: dict[str, dict[str, Any]] = defaultdict(dict)
    for mark in parameter.metadata:
        if isinstance(mark, Without):
            omitted |= set(mark.fields)
        elif isinstance(mark, Default):
            for name, value in mark.values.items():
                changes[name]["default"] = value
        elif isinstance(mark, Brief):
            for name, description in mark.descriptions.items():
                changes[name]["description"] = description
    return {
        name: (field.annotation, changed(field, changes[name]))
        for name, field in spec.model_fields.items()
        if name not in omitted
    }


def changed(field: FieldInfo, changes: Mapping[str, Any]) -> FieldInfo:
    """A copy of a field with another default or description."""
    copied = copy(field)
    for name, value in changes.items():
        setattr(copied, name, value)
    return copied
