"""The form of a new template: one build step per line, or between two lines of backticks.

A pasted script, with a first line of ``#!``, is one single step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from django.http import QueryDict

from orkestr_console.core.allowlist import (
    extend_default,
    extra_names,
    replaces_default,
    split_names,
)
from orkestr_console.core.environment import (
    format_environment,
    parse_environment,
    unformattable_names,
)
from orkestr_console.core.errors import DomainError
from orkestr_console.core.script import unix_lines
from orkestr_console.core.text import INVISIBLE
from orkestr_console.http.validation import parse_spec
from orkestr_console.ui.forms import Form
from templates_app.models import Network, Template
from templates_app.specs import TemplateSpec

NUMBERS = ("step_timeout_seconds", "build_timeout_seconds", "disk_mb")
# As in Markdown (CommonMark, "Fenced code blocks"): at least as many backticks close it.
_FENCE = re.compile(r"(`{3,})[^`]*", re.ASCII)
_STEP_FIELD = re.compile(r"recipe\[(\d+)\]", re.ASCII)


@dataclass(frozen=True)
class Step:
    """One step of the recipe as typed, and the line it starts on, counted from 1."""

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
    """The *New template* form."""

    name: str = ""
    base_template: str = "python-3.12"
    recipe: str = ""
    network: str = Network.RESTRICTED.value
    # ``NAME=value`` lines, baked into the image.
    env: str = ""
    # Host names, separated by spaces, that the build may reach in addition to the default list.
    allow_domains: str = ""
    # Whether the build may reach only those, without the default list.
    only_these: bool = False
    # The build's limits, in seconds and MiB; blank for the plan's.
    step_timeout_seconds: str = ""
    build_timeout_seconds: str = ""
    disk_mb: str = ""
    reuse: str = ""
    # Steps of the original template that are left out, as they contain invisible characters.
    left_out: tuple[int, ...] = ()
    # Its variables that don't fit on a line.
    left_out_env: tuple[str, ...] = ()

    labels: ClassVar[Mapping[str, str]] = {
        "name": "The name",
        "base_template": "The base image",
        "recipe": "The recipe",
        "network": "The network",
        "env": "The environment",
        "allow_domains": "The list of hosts",
        "step_timeout_seconds": "The time for a step",
        "build_timeout_seconds": "The time for the build",
        "disk_mb": "The disk",
        "reuse": "What to reuse",
    }

    @classmethod
    def from_post(cls, data: QueryDict) -> TemplateForm:
        """A form from posted data. Browsers end lines with CR LF."""
        return cls(
            name=data.get("name", ""),
            base_template=data.get("base_template", ""),
            recipe=unix_lines(data.get("recipe", "")),
            network=data.get("network", ""),
            env=unix_lines(data.get("env", "")),
            allow_domains=data.get("allow_domains", "").strip(),
            only_these=data.get("only_these") == "on",
            step_timeout_seconds=data.get("step_timeout_seconds", "").strip(),
            build_timeout_seconds=data.get("build_timeout_seconds", "").strip(),
            disk_mb=data.get("disk_mb", "").strip(),
            reuse=data.get("reuse", ""),
        )

    @classmethod
    def from_preset(cls, key: str) -> TemplateForm:
        """A form filled with a preset's recipe, or an empty one if there is no such preset."""
        chosen = next((preset for preset in PRESETS if preset.key == key), None)
        return cls(base_template=chosen.base, recipe=chosen.recipe) if chosen else cls()

    @classmethod
    def from_template(cls, template: Template) -> TemplateForm:
        """A form that would build the same template again, for the person to change."""
        steps = list(enumerate(template.recipe, start=1))
        return cls(
            name=template.name,
            base_template=template.base_template,
            recipe="\n".join(format_step(step) for _, step in steps if is_displayable(step)),
            network=template.network,
            env=format_environment(template.env),
            allow_domains=extra_names(template.allow_domains),
            only_these=replaces_default(template.allow_domains),
            step_timeout_seconds=field_text(template.step_timeout_seconds),
            build_timeout_seconds=field_text(template.build_timeout_seconds),
            disk_mb=field_text(template.disk_mb),
            left_out_env=unformattable_names(template.env),
            left_out=tuple(number for number, step in steps if not is_displayable(step)),
        )

    def spec(self) -> TemplateSpec:
        """The validated request. Raises ``InvalidInput`` with a sentence per field."""
        self.reject_unusable()
        return parse_spec(
            TemplateSpec,
            {
                "name": self.name,
                "base_template": self.base_template,
                "recipe": [step.command for step in parse_steps(self.recipe)],
                "network": self.network,
                "env": parse_environment(self.env),
                "allow_domains": self.allowlist(),
                **{name: parse_number(getattr(self, name)) for name in NUMBERS},
                "reuse": self.reuse or None,
            },
        )

    @property
    def has_limits(self) -> bool:
        """Whether any limit or reuse is set or has an error."""
        names = (*NUMBERS, "reuse")
        return any(getattr(self, name) or name in self.errors for name in names)

    def allowlist(self) -> list[str] | None:
        """The allowlist that the typed names stand for; None on the open network."""
        if self.network != Network.RESTRICTED:
            return None
        return (
            split_names(self.allow_domains)
            if self.only_these
            else extend_default(self.allow_domains)
        )

    def add_limit_error(self, error: DomainError) -> None:
        """Attach the refusal of a limit to its field."""
        name = str(error.extra.get("limit", ""))
        if name in NUMBERS and not error.fields:
            sentence = error.detail.removeprefix(f"{name}: ")
            self.errors = {name: f"{sentence[:1].upper()}{sentence[1:]}"}

    def add_error(self, error: DomainError) -> None:
        """As any form does, but name the line of an invalid step: people see lines."""
        super().add_error(error)
        self.add_limit_error(error)
        steps = parse_steps(self.recipe)
        sentences = [
            f"Line {steps[int(found[1])].line} {sentence}"
            for name, sentence in (error.fields or {}).items()
            if (found := _STEP_FIELD.fullmatch(name)) and int(found[1]) < len(steps)
        ]
        if sentences:
            self.errors.pop("form", None)
            self.errors["recipe"] = " ".join(sentences)


def field_text(number: int | None) -> str:
    """A number as a form field holds it; blank for None."""
    return "" if number is None else str(number)


def parse_number(typed: str) -> int | str | None:
    """The number typed, or None for a blank. Other text stays, for the spec to refuse."""
    return int(typed) if typed.isascii() and typed.isdigit() and len(typed) < 10 else typed or None


def parse_steps(recipe: str) -> list[Step]:
    """The steps of a recipe: one per line; a trailing ``\\`` continues a line on the next.

    Blank lines and comments (``#``) are skipped. A fenced block is one step, taken verbatim, and so
    is an entire recipe that starts with ``#!``.
    """
    if recipe.startswith("#!"):
        return [Step(1, recipe)]
    steps: list[Step] = []
    lines = enumerate(recipe.split("\n"), start=1)
    for number, line in lines:
        if fence := _FENCE.fullmatch(line.rstrip()):
            steps.append(Step(number + 1, "\n".join(fenced_lines(lines, len(fence[1])))))
        elif not is_comment(line):
            steps.append(Step(number, "\n".join(continuation_lines(line, lines))))
    return steps


def fenced_lines(lines: Iterator[tuple[int, str]], backticks: int) -> Iterator[str]:
    """The lines up to the closing fence of at least ``backticks``, or to the end."""
    for _, line in lines:
        if re.fullmatch(rf"`{{{backticks},}}", line.rstrip()):
            return
        yield line


def continuation_lines(line: str, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    """A line, and the lines that continue it."""
    yield line
    if line.endswith("\\"):
        for _, following in lines:
            yield following
            if not following.endswith("\\"):
                return


def format_step(step: str) -> str:
    """A step as text of a recipe: on its own, or in a fenced block."""
    # One that ends in a backslash would be continued by the next step's line.
    unfenced = not step.startswith("#!") and not step.endswith("\\")
    if unfenced and [found.command for found in parse_steps(step)] == [step]:
        return step
    longest_run = max((len(run) for run in re.findall(r"^`{3,}", step, re.MULTILINE)), default=2)
    fence = "`" * (longest_run + 1)
    return f"{fence}\n{step}\n{fence}"


def is_comment(line: str) -> bool:
    """Whether a line is blank or a comment."""
    return not line.strip() or line.lstrip().startswith("#")


def is_displayable(step: str) -> bool:
    """Whether a reader sees everything in the step: it has no invisible characters."""
    return not INVISIBLE.search(step)
