"""What the console's forms share.

A form keeps what was typed as it was typed, builds the same spec that REST builds, and puts the
sentence of a refusal at the field it is about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from orkestr_console.core.errors import DomainError, InvalidInput
from orkestr_console.core.text import storage_problem

# At no field: shown above the form.
FORM_ERROR = "form"


@dataclass
class Form:
    """Typed values are the dataclass's own fields; ``errors`` maps a field to its sentence."""

    errors: dict[str, str] = field(default_factory=dict, kw_only=True)
    labels: ClassVar[Mapping[str, str]] = {}

    def reject_unusable(self) -> None:
        """Raise ``InvalidInput`` for text that can be neither stored nor sent on."""
        problems = {name: storage_problem(str(getattr(self, name, ""))) for name in self.labels}
        fields = {name: sentence for name, sentence in problems.items() if sentence}
        if fields:
            raise InvalidInput(next(iter(fields.values())), fields=fields)

    def add_error(self, error: DomainError) -> None:
        """Put the refusal where it belongs; what belongs to no field stands above the form."""
        fields = error.fields or {}
        self.errors = {
            name: self.with_label(name, sentence)
            for name, sentence in fields.items()
            if name in self.labels
        }
        if not self.errors:
            self.errors[FORM_ERROR] = error.detail

    def with_label(self, name: str, sentence: str) -> str:
        """The sentence with its subject: specs say "must not be blank", people read more."""
        if sentence[:1].islower():
            return f"{self.labels[name]} {sentence}"
        return sentence
