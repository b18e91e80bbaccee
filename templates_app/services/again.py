"""Rebuilding a template: the same recipe, as a new template."""

from __future__ import annotations

from typing import Literal

from orkestr_console.accounts.actor import Actor
from templates_app.models import StepStatus, Template
from templates_app.services.lost import IMAGE_LOST
from templates_app.services.templates import create_template, get_template
from templates_app.specs import TemplateSpec


def rebuild_template(
    actor: Actor, template_id: str, *, reuse: Literal["failed"] | None = None
) -> Template:
    """A new template with the recipe and the choices of one of the team's templates.

    The old one stays as it is. Raises ``NotFound`` and whatever ``create_template`` does.
    """
    template = get_template(actor, template_id)
    return create_template(actor, spec_from(template, reuse))


def spec_from(template: Template, reuse: Literal["failed"] | None = None) -> TemplateSpec:
    """The request that would create the same template again."""
    # Not validated again: it was when it was created, and its base is resolved anew.
    return TemplateSpec.model_construct(
        name=template.name,
        base_template=template.base_template,
        recipe=list(template.recipe),
        network=template.network,
        allow_domains=template.allow_domains,
        env=dict(template.env),
        step_timeout_seconds=template.step_timeout_seconds,
        build_timeout_seconds=template.build_timeout_seconds,
        disk_mb=template.disk_mb,
        reuse=reuse,
    )


def completed_steps(template: Template) -> int:
    """How many steps of a failed build need not run again."""
    if template.status != "failed" or template.error_code == IMAGE_LOST:
        # A successful build keeps none.
        return 0
    done = (StepStatus.SUCCEEDED, StepStatus.CACHED)
    return template.steps.filter(status__in=done).count()
