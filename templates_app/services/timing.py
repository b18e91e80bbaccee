"""How a build spent its time, from its rows and events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from templates_app.models import BuildEvent, BuildStep, Template, TemplateStatus
from templates_app.services.record import BASE_EVENT

MILLISECOND = timedelta(milliseconds=1)
# Too large or too many to be read again with every change, and the page doesn't need them.
EXCLUDED_KINDS = ("output", "contents", "progress")
PHASES = {
    "capture": "Capturing",
    "scrub": "Cleaning up",
    "contents": "Listing what is in it",
    "publish": "Writing it to disk",
}


@dataclass(frozen=True)
class Part:
    """One part of a build's time, in milliseconds."""

    name: str
    label: str
    ms: int


@dataclass(frozen=True)
class Silence:
    """A running step has printed nothing since then."""

    step: int
    since: datetime


@dataclass(frozen=True)
class Progress:
    """Progress in creating the image: the phase in words, and the files and bytes processed."""

    label: str
    files: int
    bytes: int


def build_events(template: Template) -> list[BuildEvent]:
    """A build's events, except those of large or frequent kinds."""
    return list(template.events.exclude(kind__in=EXCLUDED_KINDS))


def parts(
    template: Template, steps: Iterable[BuildStep], events: Iterable[BuildEvent]
) -> list[Part]:
    """The known parts of a build's time, in order, without empty ones.

    A part is missing if the build is older than its event, or stopped before it.
    """
    payloads: dict[str, dict[str, Any]] = {event.kind: event.payload for event in events}
    boot = payloads.get("boot", {})
    measured: list[tuple[str, str, float | None]] = [
        ("boot", "Boot", boot.get("duration_ms", boot.get("boot_ms"))),
        ("steps", "Steps", sum(step.duration_ms or 0 for step in steps)),
        ("scrub", "Clean", payloads.get("scrub", {}).get("duration_ms")),
        ("capture", "Capture", payloads.get("capture", {}).get("duration_ms")),
        ("contents", "List contents", listing_ms(template)),
        ("publish", "Publish", payloads.get("published", {}).get("publish_ms")),
    ]
    known = sum(ms or 0 for _, _, ms in measured)
    # Such as waiting for the disk.
    other = (template.build_ms or 0) - known
    all_parts = [
        ("queue", "In the queue", queue_ms(template)),
        *measured,
        ("other", "Other", other),
    ]
    return [Part(name, label, round(ms)) for name, label, ms in all_parts if ms and ms >= 0.5]


def base_line(events: Iterable[BuildEvent]) -> str | None:
    """The last that was told of a base that the build waited for; None if it did not."""
    lines = [str(event.payload.get("message", "")) for event in events if event.kind == BASE_EVENT]
    if not lines:
        return None
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def listing_ms(template: Template) -> float | None:
    """How long the host took to list the image's contents; None if unknown."""
    durations = template.events.filter(kind="contents").values_list(
        "payload__duration_ms", flat=True
    )
    found = durations.first()
    return float(found) if isinstance(found, int | float) else None


def queue_ms(template: Template) -> float | None:
    """How long a build was queued, in milliseconds; None while it is."""
    left_queue_at = template.started_at or template.finished_at
    return (left_queue_at - template.created_at) / MILLISECOND if left_queue_at else None


def progress(template: Template) -> Progress | None:
    """The progress that the host last reported; None before that, and once the build is over."""
    if template.status != TemplateStatus.BUILDING:
        return None
    last = template.events.filter(kind="progress").order_by("-seq").first()
    return progress_of(last.payload) if last is not None else None


def progress_of(payload: dict[str, Any]) -> Progress:
    """The progress that an event's payload describes."""
    label = PHASES.get(str(payload.get("phase")), "Making the image")
    return Progress(label, int(payload.get("files", 0)), int(payload.get("bytes", 0)))


def silence(template: Template, running: BuildStep | None) -> Silence | None:
    """Since when the running step has been silent, if the host reported that it is."""
    if running is None:
        return None
    last = template.events.filter(step=running.number).order_by("-seq").first()
    if last is None or last.kind != "step_silent":
        return None
    length = timedelta(seconds=float(last.payload.get("seconds", 0)))
    return Silence(running.number, last.at - length)
