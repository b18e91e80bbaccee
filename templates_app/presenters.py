"""Templates as clients see them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from orkestr_console.json_api import timestamp
from templates_app.models import Template, TemplateStatus
from templates_app.services import ShownStep


def template_summary(template: Template) -> dict[str, Any]:
    """A template in a list."""
    ready = template.status == TemplateStatus.READY
    return {
        "id": template.pk,
        "name": template.name,
        "status": template.status,
        "base_template": template.base_template,
        "recipe": template.recipe,
        "network": template.network,
        "allow_domains": template.allow_domains,
        "refused_hosts": template.refused_hosts,
        "error_message": template.error_message or None,
        "error_code": template.error_code or None,
        "size_bytes": template.size_bytes,
        "file_count": template.file_count,
        "shared_bytes": template.shared_bytes,
        "build_ms": template.build_ms,
        "created_at": timestamp(template.created_at),
        "finished_at": timestamp(template.finished_at),
        "ready_at": timestamp(template.finished_at) if ready else None,
    }


def template_detail(template: Template, steps: Iterable[ShownStep]) -> dict[str, Any]:
    """One template, with the steps of its build."""
    return {**template_summary(template), "steps": [step_detail(step) for step in steps]}


def step_detail(shown: ShownStep) -> dict[str, Any]:
    """One step of a build."""
    step = shown.step
    return {
        "number": step.number,
        "command": step.command,
        "status": step.status,
        "started_at": timestamp(step.started_at),
        "duration_ms": step.duration_ms,
        "exit_code": step.exit_code,
        "signal": step.signal,
        "output": shown.output,
        "output_truncated": shown.truncated,
        "output_bytes": step.output_bytes,
        "elided_bytes": step.elided_bytes,
    }
