"""The form of a new template: one build step per line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from django.http import QueryDict

from orkestr_console.console.forms import Form
from orkestr_console.egress import besides_default, names_in, own_names, replaces_default
from orkestr_console.errors import DomainError
from orkestr_console.text import STEERING
from orkestr_console.validation import parse_spec
from templates_app.models import Network, Template
from templates_app.specs import TemplateSpec

NUMBERS = ("step_timeout_seconds", "build_timeout_seconds", "disk_mb")
_STEP_FIELD = re.compile(r"recipe\[(\d+)\]", re.ASCII)


@dataclass(frozen=True)
class Step:
    """One step of the recipe as typed, and the number of the line it begins on, from 1."""

    line: int
    command: str


@dataclass(frozen=True)
class Preset:
    """A recipe to start from."""

    key: str
    title: str
    base: str
    recipe: str


PRESETS = (
    Preset("data", "Data science", "python-3.12", "pip install pandas numpy pyarrow"),
    Preset("web", "Web scraping", "python-3.12", "pip install httpx beautifulsoup4 lxml"),
    Preset("node", "TypeScript", "node-22", "npm install -g typescript tsx"),
    Preset(
        "tools",
        "Command line tools",
        "debian-12",
        "apt-get update && apt-get install -y --no-install-recommends jq git curl",
    ),
)


@dataclass
class TemplateForm(Form):
    """What is typed into *New template*."""

    name: str = ""
    base_template: str = "python-3.12"
    recipe: str = ""
    network: str = Network.RESTRICTED.value
    # Host names, with blanks between, that the build may reach beside the default list.
    allow_domains: str = ""
    # Whether it may reach those alone, without the default list.
    only_these: bool = False
    # What the build may take, in seconds and MiB; blank for what the plan gives.
    step_timeout_seconds: str = ""
    build_timeout_seconds: str = ""
    disk_mb: str = ""
    reuse: str = ""
    # Steps of the template this one starts from that one line each cannot say.
    left_out: tuple[int, ...] = ()

    labels: ClassVar[Mapping[str, str]] = {
        "name": "The name",
        "base_template": "The base image",
        "recipe": "The recipe",
        "network": "The network",
        "allow_domains": "The list of hosts",
        "step_timeout_seconds": "The time for a step",
        "build_timeout_seconds": "The time for the build",
        "disk_mb": "The disk",
        "reuse": "What to reuse",
    }

    @classmethod
    def typed(cls, data: QueryDict) -> TemplateForm:
        """What was posted; browsers end lines with CR LF."""
        return cls(
            name=data.get("name", ""),
            base_template=data.get("base_template", ""),
            recipe=data.get("recipe", "").replace("\r\n", "\n").replace("\r", "\n"),
            network=data.get("network", ""),
            allow_domains=data.get("allow_domains", "").strip(),
            only_these=data.get("only_these") == "on",
            step_timeout_seconds=data.get("step_timeout_seconds", "").strip(),
            build_timeout_seconds=data.get("build_timeout_seconds", "").strip(),
            disk_mb=data.get("disk_mb", "").strip(),
            reuse=data.get("reuse", ""),
        )

    @classmethod
    def preset(cls, key: str) -> TemplateForm:
        """A form filled with a preset's recipe; an unknown one leaves it as new."""
        chosen = next((preset for preset in PRESETS if preset.key == key), None)
        return cls(base_template=chosen.base, recipe=chosen.recipe) if chosen else cls()

    @classmethod
    def like(cls, template: Template) -> TemplateForm:
        """A form that builds the same again, for the person to change."""
        steps = list(enumerate(template.recipe, start=1))
        return cls(
            name=template.name,
            base_template=template.base_template,
            recipe="\n".join(step for _, step in steps if sayable(step)),
            network=template.network,
            allow_domains=own_names(template.allow_domains),
            only_these=replaces_default(template.allow_domains),
            step_timeout_seconds=written(template.step_timeout_seconds),
            build_timeout_seconds=written(template.build_timeout_seconds),
            disk_mb=written(template.disk_mb),
            left_out=tuple(number for number, step in steps if not sayable(step)),
        )

    def spec(self) -> TemplateSpec:
        """What is asked for. Raises ``InvalidInput`` with a sentence per field."""
        self.refuse_unusable()
        return parse_spec(
            TemplateSpec,
            {
                "name": self.name,
                "base_template": self.base_template,
                "recipe": [step.command for step in steps_of(self.recipe)],
                "network": self.network,
                "allow_domains": self.allowlist(),
                **{name: whole_number(getattr(self, name)) for name in NUMBERS},
                "reuse": self.reuse or None,
            },
        )

    @property
    def has_limits(self) -> bool:
        """Whether anything is said of what the build may take or reuse."""
        names = (*NUMBERS, "reuse")
        return any(getattr(self, name) or name in self.errors for name in names)

    def allowlist(self) -> list[str] | None:
        """What the names typed come to; on the open network they do not matter."""
        if self.network != Network.RESTRICTED:
            return None
        return (
            names_in(self.allow_domains) if self.only_these else besides_default(self.allow_domains)
        )

    def take_limit(self, error: DomainError) -> None:
        """Put the refusal of a number at its field."""
        name = str(error.extra.get("limit", ""))
        if name in NUMBERS and not error.fields:
            sentence = error.detail.removeprefix(f"{name}: ")
            self.errors = {name: f"{sentence[:1].upper()}{sentence[1:]}"}

    def take(self, error: DomainError) -> None:
        """As any form; of a wrong step it says the line, as that is what people see."""
        super().take(error)
        self.take_limit(error)
        steps = steps_of(self.recipe)
        sentences = [
            f"Line {steps[int(found[1])].line} {sentence}"
            for name, sentence in (error.fields or {}).items()
            if (found := _STEP_FIELD.fullmatch(name)) and int(found[1]) < len(steps)
        ]
        if sentences:
            self.errors.pop("form", None)
            self.errors["recipe"] = " ".join(sentences)


def written(number: int | None) -> str:
    """A number as a field has it; blank for none."""
    return "" if number is None else str(number)


def whole_number(typed: str) -> int | str | None:
    """What was typed as a number, None for nothing; what is none stays, for the spec to refuse."""
    return int(typed) if typed.isascii() and typed.isdigit() and len(typed) < 10 else typed or None


def steps_of(recipe: str) -> list[Step]:
    """The steps of a recipe: a line each, but one that ends in ``\\`` goes on on the next.

    Blank lines and lines that begin with ``#`` are left out.
    """
    steps: list[Step] = []
    begun: Step | None = None
    for number, line in enumerate(recipe.split("\n"), start=1):
        if begun is None and is_remark(line):
            continue
        begun = Step(begun.line, f"{begun.command}\n{line}") if begun else Step(number, line)
        if not line.endswith("\\"):
            steps.append(begun)
            begun = None
    return [*steps, begun] if begun else steps


def is_remark(line: str) -> bool:
    """Whether a line is no step."""
    return not line.strip() or line.lstrip().startswith("#")


def sayable(step: str) -> bool:
    """Whether the recipe's text can say this step, with nothing in it that cannot be seen."""
    return not STEERING.search(step) and [found.command for found in steps_of(step)] == [step]
