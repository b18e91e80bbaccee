"""A build's complete log, as text for download."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from orkestr_console.core.text import plain
from orkestr_console.http.json_api import timestamp
from orkestr_console.http.threads import in_thread
from templates_app.models import BuildStep, StepStatus, Template
from templates_app.services.record import BASE_EVENT, output_from_events


async def log_text(template: Template) -> AsyncGenerator[bytes]:
    """The steps with all their output, without colours, one step at a time."""
    yield log_header(template).encode()
    for line in await in_thread(base_lines, template):
        yield f"# {plain(line)}\n".encode()
    # Each call returns its connection; Django's own asynchronous queries keep theirs.
    for step in await in_thread(steps_without_output, template):
        yield f"\n$ {step.command}\n".encode()
        text = await in_thread(step_output, template, step.number)
        yield (text if not text or text.endswith("\n") else f"{text}\n").encode()
        yield f"# {outcome_text(step)}\n".encode()
    if template.error_message:
        yield f"\n{plain(template.error_message)}\n".encode()


def base_lines(template: Template) -> list[str]:
    """What was told of the base that the build waited for."""
    events = template.events.filter(kind=BASE_EVENT)
    return [str(text) for text in events.values_list("payload__message", flat=True)]


def steps_without_output(template: Template) -> list[BuildStep]:
    """The steps, without their output."""
    return list(template.steps.defer("output"))


def step_output(template: Template, number: int) -> str:
    """A step's stored output so far, as plain text."""
    step = template.steps.get(number=number)
    return plain(step.output or output_from_events(template, number))


def log_header(template: Template) -> str:
    """The lines that name the template."""
    return (
        f"# Template {template.name} ({template.pk}) on {template.base_template}, network "
        f"{template.network}\n# Created {timestamp(template.created_at)}, now {template.status}\n"
    )


def outcome_text(step: BuildStep) -> str:
    """A step's result in words."""
    if step.status == StepStatus.CACHED:
        return f"cached: run by an earlier build, {timestamp(step.cached_at)}"
    if step.exit_code is None and step.signal is None:
        return step.status
    outcome = f"exit {step.exit_code}" if step.signal is None else f"signal {step.signal}"
    return f"{step.status}: {outcome} after {(step.duration_ms or 0) / 1000:.1f} s"
