"""Templates as the API presents them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from orkestr_console.http.json_api import timestamp
from templates_app.answers import (
    BaseDetail,
    BuildEvent,
    ContentsDetail,
    DifferenceDetail,
    EventList,
    StepAdded,
    StepDetail,
    TemplateDetail,
    TemplateSummary,
)
from templates_app.models import Template, TemplateStatus
from templates_app.services import BaseChoice, Event, EventPage, QueuePosition, StepOutput
from templates_app.services.contents import Contents, Difference, StepSize


def base_detail(base: BaseChoice) -> BaseDetail:
    """A built-in base."""
    return {
        "id": base.id,
        "title": base.title,
        "description": base.description,
        "state": base.state,
        "on_request": base.on_request,
        "size_bytes": base.size_bytes,
        "progress": base.progress,
        "error": base.error,
    }


def template_summary(template: Template) -> TemplateSummary:
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
        "env": template.env,
        "refused_hosts": template.refused_hosts,
        "error_message": template.error_message or None,
        "error_code": template.error_code or None,
        "size_bytes": template.size_bytes,
        "file_count": template.file_count,
        "shared_bytes": template.shared_bytes,
        "build_ms": template.build_ms,
        "digest": (template.contents or {}).get("digest"),
        "step_timeout_seconds": template.step_timeout_seconds,
        "build_timeout_seconds": template.build_timeout_seconds,
        "disk_mb": template.disk_mb,
        "reuse": template.reuse or None,
        "created_at": timestamp(template.created_at),
        "started_at": timestamp(template.started_at),
        "finished_at": timestamp(template.finished_at),
        "ready_at": timestamp(template.finished_at) if ready else None,
        "last_used_at": timestamp(template.last_used_at),
    }


def template_detail(
    template: Template, steps: Iterable[StepOutput], position: QueuePosition | None
) -> TemplateDetail:
    """One template, with its queue position if it waits, and the steps of its build.

    ``baked_env`` is the image's final environment: its base's variables, those that its recipe put
    into /etc/environment, and its own ``env`` on top.
    """
    return {
        **template_summary(template),
        "baked_env": template.baked_env,
        "queue": {"place": position.number, "waits_for": position.waits_for} if position else None,
        "steps": [step_detail(step) for step in steps],
    }


def step_detail(shown: StepOutput) -> StepDetail:
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
        "added_bytes": step.added_bytes,
        "added_files": step.added_files,
        "refused_hosts": step.refused_hosts,
        "cached_at": timestamp(step.cached_at),
        "warnings": step.warnings,
    }


def event_detail(event: Event) -> BuildEvent:
    """One event of a build; all members but the first three depend on the kind."""
    shown = {"seq": event.seq, "kind": event.kind, "at": timestamp(event.at), **event.payload}
    return cast("BuildEvent", shown)


def event_page(page: EventPage, after: int) -> EventList:
    """A page of events, and the number to continue after."""
    last = page.events[-1].seq if page.events else after
    events = [event_detail(event) for event in page.events]
    return {"events": events, "next_after": last, "ended": page.ended}


def contents_detail(contents: Contents) -> ContentsDetail:
    """What is in an image."""
    return {
        "template_id": contents.template.pk,
        "digest": contents.digest,
        "size_bytes": contents.template.size_bytes,
        "file_count": contents.template.file_count,
        "shared_bytes": contents.template.shared_bytes,
        "packages": {
            manager: [{"name": package.name, "version": package.version} for package in packages]
            for manager, packages in contents.packages.items()
        },
        "packages_truncated": contents.truncated,
        "steps": [step_size(step) for step in contents.steps],
        "scrub_removed": [
            {"what": gone.what, "bytes": gone.bytes, "files": gone.files}
            for gone in contents.removed
        ],
    }


def step_size(step: StepSize) -> StepAdded:
    """What a step added to the image."""
    return {
        "number": step.number,
        "command": step.command,
        "added_bytes": step.added_bytes,
        "added_files": step.added_files,
        "cached": step.cached,
    }


def difference_detail(difference: Difference) -> DifferenceDetail:
    """How two images differ; ``a`` is the requested one, ``b`` the one it is compared with."""
    return {
        "a": difference.a.template.pk,
        "b": difference.b.template.pk,
        "same_image": difference.same_image,
        "packages": {
            item.manager: {
                "only_in_a": [{"name": p.name, "version": p.version} for p in item.only_a],
                "only_in_b": [{"name": p.name, "version": p.version} for p in item.only_b],
                "changed": [
                    {"name": p.name, "a": ", ".join(p.a), "b": ", ".join(p.b)} for p in item.changed
                ],
                "same": item.same,
            }
            for item in difference.packages
        },
        "sizes": {item.name: {"a": item.a, "b": item.b} for item in difference.sizes},
        "steps": [
            {
                "number": item.number,
                "same_command": item.same_command,
                "a": step_size(item.a) if item.a else None,
                "b": step_size(item.b) if item.b else None,
            }
            for item in difference.steps
        ],
    }
