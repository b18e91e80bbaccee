"""What the template pages show: the same for a request and for a live update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.db.models import Max
from django.template.loader import render_to_string

from orkestr_console.accounts.actor import Actor
from orkestr_console.console.ansi import Rendered, rendered
from templates_app import services
from templates_app.models import BuildStep, Template, TemplateStatus

PAGE = 100
PARTIALS = "templates_app/_detail.html"


@dataclass(frozen=True)
class ShownStep:
    """A step and its output, as far as the page has it."""

    step: BuildStep
    log: Rendered


def list_context(actor: Actor, cursor: str | None) -> dict[str, Any]:
    """A page of templates, newest first."""
    rows, following = services.list_templates(actor, limit=PAGE, cursor=cursor)
    return {
        "templates": rows,
        "next_cursor": following,
        "usage": services.template_usage(actor),
        "plan": actor.team.plan,
    }


def detail_context(template: Template, address: str) -> dict[str, Any]:
    """The whole page of one template. ``after`` is the last event that it shows."""
    # The number first: whatever is stored after it comes through the socket.
    after = last_event(template)
    texts = output_until(template, after) if template.status == TemplateStatus.BUILDING else None
    shown = [
        ShownStep(step, rendered(step.output if texts is None else texts[step.number]))
        for step in template.steps.all()
    ]
    return {**facts(template, address), "shown": shown, "after": after}


def facts(template: Template, address: str) -> dict[str, Any]:
    """What the parts of the page that change need."""
    steps = list(template.steps.defer("output"))
    done = sum(step.status == "succeeded" for step in steps)
    return {
        "template": template,
        "steps": steps,
        "done": done,
        "running": next((step for step in steps if step.status == "running"), None),
        "phases": set(template.events.exclude(kind="output").values_list("kind", flat=True)),
        "capture_state": capture_state(template, done),
        "address": address,
    }


def capture_state(template: Template, done: int) -> str:
    """The state of a build's last phase, in the words of its steps; ``done`` counts those."""
    if template.status != TemplateStatus.BUILDING:
        return "succeeded" if template.is_ready else "skipped"
    return "running" if done == len(template.recipe) else "pending"


def fragments(template: Template, address: str) -> dict[str, str]:
    """The parts of the page that change, by the id of their element."""
    context = facts(template, address)
    parts = {f"template-{part}": part for part in ("head", "banner", "side", "phases")}
    html: dict[str, str] = {
        key: render_to_string(f"{PARTIALS}#{part}", context) for key, part in parts.items()
    }
    for step in context["steps"]:
        line = render_to_string(f"{PARTIALS}#step", {"step": step})
        html[f"step-{step.number}-line"] = line
    return html


def last_event(template: Template) -> int:
    """The number of the last event there is; 0 before the first."""
    last: int | None = template.events.aggregate(last=Max("seq"))["last"]
    return last or 0


def output_until(template: Template, seq: int) -> dict[int, str]:
    """The text that each step had printed when event ``seq`` came."""
    texts: dict[int, list[str]] = defaultdict(list)
    for step, text in outputs(template.events.filter(kind="output", seq__lte=seq)):
        texts[step].append(text)
    return defaultdict(str, {step: "".join(parts) for step, parts in texts.items()})


def outputs(events: Any) -> Iterable[tuple[int, str]]:
    """Step and text of output events."""
    for step, payload in events.values_list("step", "payload"):
        yield step, str(payload.get("text", ""))


def printed(template: Template, number: int, until: int | None = None) -> str:
    """What one step printed so far, or until event ``until``."""
    events = template.events.filter(kind="output", step=number)
    if until is not None:
        events = events.filter(seq__lte=until)
    return "".join(text for _, text in outputs(events))
