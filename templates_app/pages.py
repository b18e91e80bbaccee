"""The content of the template pages, shared by requests and live updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from django.db.models import Max
from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limits import envelope
from orkestr_console.ui.ansi import RenderedLog, render
from templates_app import services
from templates_app.models import BuildStep, Reuse, StepStatus, Template, TemplateStatus
from templates_app.services import again, output, timing

PAGE = 100
PARTIALS = "templates_app/_detail.html"
# A page opens with the tails of its logs: long ones for expanded steps, short ones for the rest.
OPEN_LINES, OPEN_CHARACTERS = 1000, 512 * 1024
CLOSED_LINES, CLOSED_CHARACTERS = 4000, 64 * 1024
# The sidebar is rendered with every change, and 64 KiB of environment may be thousands.
MAX_VARIABLES = 40
DONE = (StepStatus.SUCCEEDED, StepStatus.CACHED)
STATUSES_WITHOUT_OUTPUT = (StepStatus.PENDING, StepStatus.CACHED, StepStatus.SKIPPED)
EXPANDED_STATUSES = (StepStatus.RUNNING, StepStatus.FAILED)


@dataclass(frozen=True)
class Gap:
    """Lines of a log that the page doesn't have, ``first`` to ``last``."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """How many there are."""
        return max(self.last - self.first + 1, 0)


@dataclass(frozen=True)
class LogSegment:
    """Some lines of a log, and the gap before them."""

    gap: Gap
    log: RenderedLog


@dataclass(frozen=True)
class StepView:
    """A step and the output that the page shows; the last segment is the log's end."""

    step: BuildStep
    pieces: Sequence[LogSegment]
    unfolded: bool


@dataclass(frozen=True)
class LineReference:
    """A line of a step's output, as in ``?line=2-1234``."""

    step: int
    number: int


def list_context(actor: Actor, cursor: str | None) -> dict[str, Any]:
    """A page of templates, newest first."""
    rows, next_cursor = services.list_templates(actor, limit=PAGE, cursor=cursor)
    return {
        "templates": rows,
        "next_cursor": next_cursor,
        "usage": services.template_usage(actor),
        "plan": actor.team.plan,
    }


def detail_context(
    template: Template, address: str, line: LineReference | None = None
) -> dict[str, Any]:
    """The full page of one template. ``after`` is the last event that it shows."""
    # The number first: whatever is stored after it arrives through the socket.
    after = last_event(template)
    until = after if template.status == TemplateStatus.BUILDING else None
    context = live_context(template, address)
    shown = [step_view(step, len(context["steps"]), until, line) for step in context["steps"]]
    return {**context, "shown": shown, "after": after, "line": line}


def step_view(
    step: BuildStep, steps: int, until: int | None, line: LineReference | None
) -> StepView:
    """A step with the end of its log, and with the requested line if it is one of its own."""
    target = line if line and line.step == step.number else None
    expanded = step.status in EXPANDED_STATUSES or target is not None
    if expanded:
        max_lines, size = OPEN_LINES, OPEN_CHARACTERS
    else:
        max_lines, size = max(CLOSED_LINES // steps, 40), CLOSED_CHARACTERS
    if step.status in STATUSES_WITHOUT_OUTPUT:
        end = output.TextSlice("", 1)
    else:
        end = output.tail(step.template, step.number, size, until=until)
    last = render(end.text, first=end.first, lead=end.lead, max_lines=max_lines, numbered=True)
    segments = [LogSegment(Gap(1, last.first - 1), last)]
    if target and target.number < last.first:
        segments = segments_around(step, last, target)
    return StepView(step, segments, expanded)


def segments_around(step: BuildStep, last: RenderedLog, target: LineReference) -> list[LogSegment]:
    """The segments around the requested line, and the end of the log."""
    window = log_window(step.template, step.number, Gap(1, last.first - 1), target.number)
    return [*window.pieces, LogSegment(window.after, last)]


@dataclass(frozen=True)
class LogWindow:
    """Some of a gap's lines, with the gaps that remain before them and ``after`` them."""

    pieces: list[LogSegment]
    after: Gap


def log_window(template: Template, number: int, gap: Gap, at: int) -> LogWindow:
    """The lines of a gap around line ``at``. Raises ``NotFound``."""
    stretch = output.lines(template, number, gap.first, gap.last, at)
    # Of a line too long to be shown in full, only this part is shown.
    log = render(
        stretch.text,
        first=stretch.first,
        lead=stretch.lead,
        max_lines=output.MAX_LINES * 2,
        numbered=True,
    )
    before = Gap(gap.first, stretch.first - 1)
    return LogWindow([LogSegment(before, log)], Gap(max(stretch.last + 1, gap.first), gap.last))


def live_context(template: Template, address: str) -> dict[str, Any]:
    """The context of the parts of the page that change."""
    steps = list(template.steps.defer("output"))
    events = timing.build_events(template)
    completed_steps = sum(step.status in DONE for step in steps)
    running = next((step for step in steps if step.status == StepStatus.RUNNING), None)
    phases = {event.kind for event in events}
    return {
        "template": template,
        "steps": steps,
        "done": completed_steps,
        "doing": activity(len(steps), completed_steps, running, phases, timing.base_line(events)),
        "refused_steps": [step for step in steps if step.refused_hosts],
        # Looked up only for pages that offer to allow hosts.
        "allowed": envelope(template.team) if template.refused_hosts else None,
        "allowing": allow_query(template),
        **variables(template),
        "capture_state": capture_state(template, completed_steps),
        "parts": time_bars(timing.parts(template, steps, events)),
        "silence": timing.silence(template, running),
        "progress": timing.progress(template) if completed_steps == len(steps) else None,
        "origins": cached_step_origins(template, steps),
        "place": services.queue_position(template),
        "completed": again.completed_steps(template),
        "address": address,
    }


def variables(template: Template) -> dict[str, Any]:
    """The first of a template's own variables, then of those it inherits."""
    own, baked = template.env, template.baked_env or {}
    # PATH may be both: its own value extends the inherited one.
    inherited = {name: value for name, value in baked.items() if own.get(name) != value}
    shown = list(own.items())[:MAX_VARIABLES]
    others = list(inherited.items())[: MAX_VARIABLES - len(shown)]
    more = len(own) + len(inherited) - len(shown) - len(others)
    return {"variables": shown, "inherited": others, "more_variables": more}


def allow_query(template: Template) -> str:
    """The query string of the form that rebuilds it with the refused hosts allowed."""
    query = {"from": template.pk, "allow": " ".join(template.refused_hosts)}
    if template.status == TemplateStatus.FAILED:
        query["reuse"] = Reuse.FAILED
    return urlencode(query, quote_via=quote)


def activity(
    steps: int,
    completed_steps: int,
    running: BuildStep | None,
    phases: set[str],
    base: str | None,
) -> str:
    """What a running build is doing now, as the heading of a notice."""
    if running is not None:
        return f"Step {running.number} of {steps} is running"
    if completed_steps == steps:
        return "Cleaning up and capturing the image"
    if "boot" in phases:
        return "The build container is running"
    # It only waits for that, which others may do as well.
    return base or "Waiting for the build container"


def capture_state(template: Template, completed_steps: int) -> str:
    """The status of a build's last phase, in the terms of its steps; ``done`` counts those."""
    if template.status != TemplateStatus.BUILDING:
        return "succeeded" if template.is_ready else "skipped"
    return "running" if completed_steps == len(template.recipe) else "pending"


@dataclass(frozen=True)
class Bar:
    """A part of the build's time and its position in the bar, in thousandths of the total."""

    part: timing.Part
    start: float
    width: float


def time_bars(parts: Sequence[timing.Part]) -> list[Bar]:
    """The parts of a build's time as bars side by side."""
    total = sum(part.ms for part in parts) or 1
    bars: list[Bar] = []
    start = 0.0
    for part in parts:
        width = round(1000 * part.ms / total, 1)
        bars.append(Bar(part, round(start, 1), width))
        start += width
    return bars


def cached_step_origins(template: Template, steps: Iterable[BuildStep]) -> dict[str, Template]:
    """The templates whose builds ran the cached steps, by image id; not those since deleted."""
    images = {step.cached_from for step in steps if step.cached_from}
    if not images:
        return {}
    found = Template.objects.for_team(template.team).filter(image_id__in=images)
    return {origin.image_id: origin for origin in found}


def fragments(
    template: Template, address: str, seen: dict[int, object] | None = None
) -> dict[str, str]:
    """The parts of the page that change, by the id of their element.

    ``seen`` remembers what was last sent of each step, by number, and unchanged steps are left out:
    there may be a hundred, and updates ten times a second.
    """
    seen = {} if seen is None else seen
    context = live_context(template, address)
    parts = {f"template-{part}": part for part in ("head", "banner", "side", "phases")}
    html: dict[str, str] = {
        key: render_to_string(f"{PARTIALS}#{part}", context) for key, part in parts.items()
    }
    html["delete-means"] = render_to_string("templates_app/_delete.html#means", context)
    for step in context["steps"]:
        warned = len(step.warnings)
        fingerprint = (step.status, step.duration_ms, step.added_bytes, warned, context["silence"])
        if seen.get(step.number) != fingerprint:
            seen[step.number] = fingerprint
            html |= step_fragments(context, step)
    return html


def step_fragments(context: dict[str, Any], step: BuildStep) -> dict[str, str]:
    """The parts of one step's row that change."""
    return {
        f"step-{step.number}-{part}": render_to_string(
            f"{PARTIALS}#step-{part}", {**context, "step": step}
        )
        for part in ("line", "warnings", "quiet")
    }


def last_event(template: Template) -> int:
    """The number of the last event; 0 before the first."""
    last: int | None = template.events.aggregate(last=Max("seq"))["last"]
    return last or 0


def output_texts(events: Any) -> Iterable[tuple[int, str]]:
    """The step and text of each output event."""
    for step, payload in events.values_list("step", "payload"):
        yield step, str(payload.get("text", ""))
