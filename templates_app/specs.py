"""The request models for templates: strict, and shared by console, REST and MCP."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from orkestr_console.core.allowlist import Allowlist
from orkestr_console.core.environment import Environment
from orkestr_console.core.script import usable_step
from orkestr_console.core.text import JOINERS, readable
from templates_app.models import MAX_NAME_LENGTH

MAX_STEPS = 100
MAX_RECIPE_BYTES = 1024 * 1024  # bytes, all steps together
MIN_DISK_MB, MAX_DISK_MB = 256, 20_480


def usable_name(name: str) -> str:
    """A name a person can read: trimmed, not blank, no control or direction characters."""
    name = name.strip().strip(JOINERS)
    if not name:
        raise ValueError("must not be blank.")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"must have at most {MAX_NAME_LENGTH} characters; this has {len(name)}.")
    return readable(name)


def usable_recipe(recipe: list[str]) -> list[str]:
    """At least one step, and not too many."""
    if not recipe:
        raise ValueError("needs at least one step, such as 'pip install requests'.")
    if len(recipe) > MAX_STEPS:
        raise ValueError(
            f"has {len(recipe)} steps; a template takes at most {MAX_STEPS}. Join some with '&&'."
        )
    if (size := sum(len(step.encode()) for step in recipe)) > MAX_RECIPE_BYTES:
        raise ValueError(
            f"has {size:,} bytes; at most {MAX_RECIPE_BYTES:,} are allowed. Download large files "
            "in a step instead."
        )
    return recipe


def usable_base(base: str) -> str:
    """A base's name or a template's id; only its form is checked."""
    if not base.strip():
        raise ValueError("is required; choose a base image such as 'python-3.12'.")
    if len(base) > 64:
        raise ValueError("is not a known base image.")
    return base.strip()


class TemplateSpec(BaseModel):
    """A template to be built."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(usable_name)]
    base_template: Annotated[str, AfterValidator(usable_base)]
    recipe: Annotated[
        list[Annotated[str, AfterValidator(usable_step)]], AfterValidator(usable_recipe)
    ]
    network: Literal["restricted", "open"] = Field(default="restricted")
    # Replaces the default list of allowed hosts; ``@default`` in it stands for that list.
    allow_domains: Allowlist = None
    # Baked into the image, for every step and for every command of a sandbox made from it.
    env: Environment = Field(default_factory=dict)
    # Less than the plan allows, in seconds and MiB.
    step_timeout_seconds: Annotated[int, Field(ge=1)] | None = None
    build_timeout_seconds: Annotated[int, Field(ge=1)] | None = None
    disk_mb: Annotated[int, Field(ge=MIN_DISK_MB, le=MAX_DISK_MB)] | None = None
    # "failed": reuse the steps that a failed build completed.
    reuse: Literal["failed"] | None = None

    @model_validator(mode="after")
    def allowlist_needs_restricted(self) -> Self:
        """Refuse an allowlist on any network but ``restricted``."""
        if self.allow_domains is not None and self.network != "restricted":
            raise ValueError("'allow_domains' applies to network 'restricted' only.")
        return self
