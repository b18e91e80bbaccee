"""The base of the console's forms.

A form keeps the input as typed, builds the same spec as REST, and attaches errors to their fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.core.text import storage_problem

# The key of an error that belongs to no field; shown above the form.
FORM_ERROR = "form"


@dataclass
class Form:
    """The dataclass's own fields are the typed values; ``errors`` maps a field to its message."""

    errors: dict[str, str] = field(default_factory=dict, kw_only=True)
    labels: ClassVar[Mapping[str, str]] = {}

    def reject_unusable(self) -> None:
        """Raise ``InvalidInput`` for text that cannot be stored or forwarded."""
        problems = {name: storage_problem(str(getattr(self, name, ""))) for name in self.labels}
        fields = {name: sentence for name, sentence in problems.items() if sentence}
        if fields:
            raise InvalidInput(next(iter(fields.values())), fields=fields)

    def add_error(self, error: DomainError) -> None:
        """Attach an error to its fields, or to the form if it has none."""
        fields = error.fields or {}
        self.errors = {
            name: self.with_label(name, sentence)
            for name, sentence in fields.items()
            if name in self.labels
        }
        if not self.errors:
            self.errors[FORM_ERROR] = error.detail

    def with_label(self, name: str, sentence: str) -> str:
        """The message with the field's label as its subject: specs say "must not be blank"."""
        if sentence[:1].islower():
            return f"{self.labels[name]} {sentence}"
        return sentence
