"""What the template pages show: the same for a request and for a live update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from django.db.models import Max
from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limits import envelope
from orkestr_console.ui.ansi import Rendered, drawn
from templates_app import services
from templates_app.models import BuildStep, Reuse, StepStatus, Template, TemplateStatus
from templates_app.services import again, output, timing

PAGE = 100
PARTIALS = "templates_app/_detail.html"
# A page opens with the ends of its logs: much of those that are open, a little of the others.
OPEN_LINES, OPEN_CHARACTERS = 1000, 512 * 1024
CLOSED_LINES, CLOSED_CHARACTERS = 4000, 64 * 1024
# The side is drawn anew with every change, and 64 KiB of environment may be thousands.
MAX_VARIABLES = 40
DONE = (StepStatus.SUCCEEDED, StepStatus.CACHED)
# These have printed nothing.
STATUSES_WITHOUT_OUTPUT = (StepStatus.PENDING, StepStatus.CACHED, StepStatus.SKIPPED)
EXPANDED_STATUSES = (StepStatus.RUNNING, StepStatus.FAILED)


@dataclass(frozen=True)
class Gap:
    """Lines of a log that the page does not have, ``first`` to ``last``."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """How many there are."""
        return max(self.last - self.first + 1, 0)


@dataclass(frozen=True)
class LogSegment:
    """Some lines of a log, and what is missing before them."""

    gap: Gap
    log: Rendered


@dataclass(frozen=True)
class StepView:
    """A step and its output as far as the page has it; the last piece is the log's end."""

    step: BuildStep
    pieces: Sequence[LogSegment]
    unfolded: bool


@dataclass(frozen=True)
class LineReference:
    """A line of a step's output, as an address names it: ``2-1234``."""

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
    """The whole page of one template. ``after`` is the last event that it shows."""
    # The number first: whatever is stored after it comes through the socket.
    after = last_event(template)
    until = after if template.status == TemplateStatus.BUILDING else None
    context = live_context(template, address)
    shown = [step_view(step, len(context["steps"]), until, line) for step in context["steps"]]
    return {**context, "shown": shown, "after": after, "line": line}


def step_view(
    step: BuildStep, steps: int, until: int | None, line: LineReference | None
) -> StepView:
    """A step with the end of its log, and with the line asked for if that is one of its own."""
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
    last = drawn(end.text, first=end.first, lead=end.lead, most=max_lines, numbered=True)
    segments = [LogSegment(Gap(1, last.first - 1), last)]
    if target and target.number < last.first:
        segments = segments_around(step, last, target)
    return StepView(step, segments, expanded)


def segments_around(step: BuildStep, last: Rendered, target: LineReference) -> list[LogSegment]:
    """A stretch with the line that was asked for, and the end of the log."""
    window = log_window(step.template, step.number, Gap(1, last.first - 1), target.number)
    return [*window.pieces, LogSegment(window.after, last)]


@dataclass(frozen=True)
class LogWindow:
    """Some of the lines that were missing, and what still is, ``after`` them too."""

    pieces: list[LogSegment]
    after: Gap


def log_window(template: Template, number: int, gap: Gap, at: int) -> LogWindow:
    """The lines around line ``at`` of those that are missing. Raises ``NotFound``."""
    stretch = output.lines(template, number, gap.first, gap.last, at)
    # A piece of a line that is too long to be shown whole is all there is of it.
    log = drawn(
        stretch.text,
        first=stretch.first,
        lead=stretch.lead,
        most=output.MAX_LINES * 2,
        numbered=True,
    )
    before = Gap(gap.first, stretch.first - 1)
    return LogWindow([LogSegment(before, log)], Gap(max(stretch.last + 1, gap.first), gap.last))


def live_context(template: Template, address: str) -> dict[str, Any]:
    """What the parts of the page that change need."""
    steps = list(template.steps.defer("output"))
    events = timing.build_events(template)
    completed_steps = sum(step.status in DONE for step in steps)
    running = next((step for step in steps if step.status == StepStatus.RUNNING), None)
    phases = {event.kind for event in events}
    return {
        "template": template,
        "steps": steps,
        "done": completed_steps,
        "doing": activity(len(steps), completed_steps, running, phases),
        "refused_steps": [step for step in steps if step.refused_hosts],
        # Looked up for those pages alone that have something to offer by it.
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
    """The first of a template's own variables, then of those it has from elsewhere."""
    own, baked = template.env, template.baked_env or {}
    # PATH may be both: what it comes to with what it stands on.
    inherited = {name: value for name, value in baked.items() if own.get(name) != value}
    shown = list(own.items())[:MAX_VARIABLES]
    others = list(inherited.items())[: MAX_VARIABLES - len(shown)]
    more = len(own) + len(inherited) - len(shown) - len(others)
    return {"variables": shown, "inherited": others, "more_variables": more}


def allow_query(template: Template) -> str:
    """The query of the form that builds it again with the hosts allowed that it was refused."""
    query = {"from": template.pk, "allow": " ".join(template.refused_hosts)}
    if template.status == TemplateStatus.FAILED:
        query["reuse"] = Reuse.FAILED
    return urlencode(query, quote_via=quote)


def activity(steps: int, completed_steps: int, running: BuildStep | None, phases: set[str]) -> str:
    """What a build that has its turn does at the moment, as the heading of a notice."""
    if running is not None:
        return f"Step {running.number} of {steps} is running"
    if completed_steps == steps:
        return "Cleaning up and capturing the image"
    if "boot" in phases:
        return "The build container is running"
    return "Waiting for the build container"


def capture_state(template: Template, completed_steps: int) -> str:
    """The state of a build's last phase, in the words of its steps; ``done`` counts those."""
    if template.status != TemplateStatus.BUILDING:
        return "succeeded" if template.is_ready else "skipped"
    return "running" if completed_steps == len(template.recipe) else "pending"


@dataclass(frozen=True)
class Bar:
    """A part of the build's time with its place in the bar, in thousandths of the whole."""

    part: timing.Part
    start: float
    width: float


def time_bars(parts: Sequence[timing.Part]) -> list[Bar]:
    """The parts of a build's time side by side."""
    total = sum(part.ms for part in parts) or 1
    bars: list[Bar] = []
    start = 0.0
    for part in parts:
        width = round(1000 * part.ms / total, 1)
        bars.append(Bar(part, round(start, 1), width))
        start += width
    return bars


def cached_step_origins(template: Template, steps: Iterable[BuildStep]) -> dict[str, Template]:
    """The templates, where they still are, whose builds ran the cached steps; by image."""
    images = {step.cached_from for step in steps if step.cached_from}
    if not images:
        return {}
    found = Template.objects.for_team(template.team).filter(image_id__in=images)
    return {origin.image_id: origin for origin in found}


def fragments(
    template: Template, address: str, seen: dict[int, object] | None = None
) -> dict[str, str]:
    """The parts of the page that change, by the id of their element.

    Of the steps only those that are not as they were when ``seen``, by number, was last written:
    there may be a hundred, and news ten times a second.
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
    """The number of the last event there is; 0 before the first."""
    last: int | None = template.events.aggregate(last=Max("seq"))["last"]
    return last or 0


def output_texts(events: Any) -> Iterable[tuple[int, str]]:
    """Step and text of output events."""
    for step, payload in events.values_list("step", "payload"):
        yield step, str(payload.get("text", ""))
