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

    name: Annotated[str, AfterValidator(usable_name)] = Field(
        description="A name people will recognise.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_NAME_LENGTH},
    )
    base_template: Annotated[str, AfterValidator(usable_base)] = Field(
        description="A base such as 'python-3.12', or the id of a ready template."
    )
    recipe: Annotated[
        list[Annotated[str, AfterValidator(usable_step)]], AfterValidator(usable_recipe)
    ] = Field(
        description="Shell steps, run in order as root with HOME=/root. Each step is a new shell: "
        "cd and variables don't carry over. /workspace and /tmp are not kept.",
        json_schema_extra={"minItems": 1, "maxItems": MAX_STEPS},
    )
    network: Literal["restricted", "open"] = Field(
        default="restricted",
        description="restricted: package registries and the default list; open: anywhere.",
    )
    allow_domains: Allowlist = Field(
        default=None,
        description="Hosts instead of the default list, for network restricted; include "
        "'@default' to keep the default list as well.",
    )
    env: Environment = Field(
        default_factory=dict,
        description="Variables baked into the image, for every step and every command of a "
        "sandbox started from it; $PATH in PATH's value stands for the usual one. No secrets: "
        "anyone who uses the template can read them.",
    )
    step_timeout_seconds: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Step timeout in seconds; the plan's by default."
    )
    build_timeout_seconds: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Build timeout in seconds; the plan's by default."
    )
    disk_mb: Annotated[int, Field(ge=MIN_DISK_MB, le=MAX_DISK_MB)] | None = Field(
        default=None, description="The size of the build's disk in MiB; 20 GiB by default."
    )
    reuse: Literal["failed"] | None = Field(
        default=None,
        description="'failed': skip the steps that an earlier failed or cancelled build completed, "
        "if base, network and steps are the same up to there.",
    )

    @model_validator(mode="after")
    def allowlist_needs_restricted(self) -> Self:
        """Refuse an allowlist on any network but ``restricted``."""
        if self.allow_domains is not None and self.network != "restricted":
            raise ValueError("'allow_domains' applies to network 'restricted' only.")
        return self
