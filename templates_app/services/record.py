"""Writing down what a build tells: the only place where a building template changes.

Every change is one compare-and-set that names the driver, so one whose build another has taken on
writes nothing more, and the event's row is in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone

from hostruntime.wire.builds import BuildEvent as HostEvent
from templates_app.events import notify_changed, notify_progress
from templates_app.models import BuildEvent, BuildStep, StepStatus, Template, TemplateStatus
from templates_app.services.direct import bypass_advice
from templates_app.services.metering import count_build, note_image_bytes

MAX_MESSAGE_CHARS = 16 * 1024
MAX_REFUSED_HOSTS = 40


class Superseded(Exception):  # noqa: N818 - it is news, not a mistake
    """Another driver follows this build now, or the template is gone."""


def record(template: Template, driver: str, event: HostEvent) -> None:
    """Store one event and what follows from it. Raises :class:`Superseded`."""
    try:
        with transaction.atomic():
            # Taken first, and kept: nobody else settles or deletes the template meanwhile.
            locked = Template.objects.select_for_update().filter(
                pk=template.pk, driver=driver, status=TemplateStatus.BUILDING
            )
            if not locked.exists():
                raise Superseded
            store_event(template, event)
            HANDLERS.get(event.kind, ignore)(template, event)
    except IntegrityError as error:
        raise Superseded from error


def store_event(template: Template, event: HostEvent) -> None:
    """Append the host's event. Its own number is unique, so it is never stored twice."""
    append_event(template, event.kind, event.data, at=to_datetime(event.at), host_seq=event.seq)


def append_event(
    template: Template,
    kind: str,
    payload: dict[str, Any],
    *,
    at: datetime | None = None,
    host_seq: int | None = None,
) -> None:
    """Append an event under the next number. The caller's transaction holds the template's row."""
    last = template.events.aggregate(last=Max("seq"))["last"] or 0
    BuildEvent.objects.create(
        template=template,
        seq=last + 1,
        host_seq=host_seq,
        kind=kind,
        step=payload.get("step"),
        payload=payload,
        at=at or timezone.now(),
    )


def step_started(template: Template, event: HostEvent) -> None:
    """A step runs."""
    event_step(template, event).update(status=StepStatus.RUNNING, started_at=to_datetime(event.at))
    notify_progress(template.pk)


def step_cached(template: Template, event: HostEvent) -> None:
    """A step is not run again: what it left in an earlier build was taken."""
    data = event.data
    event_step(template, event).update(
        status=StepStatus.CACHED,
        cached_at=to_datetime(data["saved_at"]),
        cached_from=str(data.get("build", "")),
    )
    record_refused_hosts(template, event)
    notify_progress(template.pk)


def output(template: Template, event: HostEvent) -> None:
    """A step printed something; whoever watches reads it from the events."""
    notify_progress(template.pk)


def step_finished(template: Template, event: HostEvent) -> None:
    """A step ended: how, and all it printed."""
    data = event.data
    succeeded = data.get("exit_code") == 0 and data.get("signal") is None
    event_step(template, event).update(
        status=StepStatus.SUCCEEDED if succeeded else StepStatus.FAILED,
        duration_ms=data.get("duration_ms"),
        exit_code=data.get("exit_code"),
        signal=data.get("signal"),
        output=output_from_events(template, data.get("step")),
        output_bytes=data.get("output_bytes", 0),
        elided_bytes=data.get("elided_bytes", 0),
        added_bytes=data.get("added_bytes"),
        added_files=data.get("added_files"),
    )
    record_refused_hosts(template, event)
    notify_progress(template.pk)


def record_refused_hosts(template: Template, event: HostEvent) -> None:
    """What the network policy refused the step, however it ended."""
    refused = event.data.get("refused") or []
    if refused:
        hosts = list(dict.fromkeys(str(refusal["host"]) for refusal in refused))
        event_step(template, event).update(refused_hosts=hosts)
        add_refused_hosts(
            template, [str(refusal["host"]) for refusal in refused if refusal.get("can_be_listed")]
        )
        for text in bypass_advice(refused, "This step"):
            add_warning(template, event, text)


def add_refused_hosts(template: Template, hosts: Sequence[str]) -> None:
    """Add to what another build could be allowed."""
    row = Template.objects.filter(pk=template.pk)
    known = row.values_list("refused_hosts", flat=True).get()
    hosts_seen = list(dict.fromkeys([*known, *hosts]))
    row.update(refused_hosts=hosts_seen[:MAX_REFUSED_HOSTS])


def step_warned(template: Template, event: HostEvent) -> None:
    """Something that a step did has not the effect that its author may think it has."""
    add_warning(template, event, str(event.data.get("message", "")))
    notify_progress(template.pk)


def add_warning(template: Template, event: HostEvent, text: str) -> None:
    """Add a warning to the event's step."""
    for step in event_step(template, event):
        step.warnings = [*step.warnings, text]
        step.save(update_fields=["warnings"])


def contents(template: Template, event: HostEvent) -> None:
    """What the image will hold."""
    Template.objects.filter(pk=template.pk).update(contents=event.data)
    notify_progress(template.pk)


def published(template: Template, event: HostEvent) -> None:
    """The image is there: the template is ready."""
    settle(
        template,
        status=TemplateStatus.READY,
        size_bytes=event.data.get("size_bytes"),
        file_count=event.data.get("file_count"),
        shared_bytes=event.data.get("shared_bytes"),
        build_ms=event.data.get("total_ms"),
        finished_at=to_datetime(event.at),
    )
    note_image_bytes(template.team_id)


def failed(template: Template, event: HostEvent) -> None:
    """The build ended without an image: say why, and which steps never ran."""
    add_refused_hosts(template, event.data.get("refused") or [])
    mark_failed(
        template, str(event.data.get("code", "internal")), str(event.data.get("message", ""))
    )


def ignore(template: Template, event: HostEvent) -> None:
    """Boot, silence, progress, scrub and capture are kept as events and change nothing."""
    notify_progress(template.pk)


HANDLERS = {
    "step_started": step_started,
    "step_cached": step_cached,
    "output": output,
    "step_finished": step_finished,
    "not_captured": step_warned,
    "not_reached": step_warned,
    "contents": contents,
    "published": published,
    "failed": failed,
}


def fail_build(template: Template, code: str, message: str) -> None:
    """End a build from this side, whatever the host still does: the event, then the state.

    The caller's transaction holds the row. From then on no driver records anything of it.
    """
    append_event(template, "failed", {"code": code, "message": truncate_middle(message)})
    mark_failed(template, code, message)


def mark_failed(template: Template, code: str, message: str) -> None:
    """Settle the template as failed, and the steps that were not to be."""
    for step in template.steps.filter(status=StepStatus.RUNNING):
        step.status = StepStatus.FAILED
        step.output = output_from_events(template, step.number)
        step.output_bytes = step.output_bytes or len(step.output.encode())
        step.save(update_fields=["status", "output", "output_bytes"])
    template.steps.filter(status=StepStatus.PENDING).update(status=StepStatus.SKIPPED)
    settle(
        template,
        status=TemplateStatus.FAILED,
        error_code=code,
        error_message=truncate_middle(message) or "The build failed.",
        finished_at=timezone.now(),
    )


def truncate_middle(message: str) -> str:
    """The message without its middle if it is too long: the step leads, its output's end closes."""
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    half = MAX_MESSAGE_CHARS // 2
    elided = len(message) - 2 * half
    return f"{message[:half]}\n[… {elided:,} characters left out …]\n{message[-half:]}"


def settle(template: Template, **changes: Any) -> None:
    """The one transition out of ``building``. The caller's transaction holds the row."""
    rows = Template.objects.filter(pk=template.pk, status=TemplateStatus.BUILDING)
    if not rows.update(driver="", **changes):
        raise Superseded
    count_build(template)
    notify_changed(template.pk, template.team_id)


def output_from_events(template: Template, step: int | None) -> str:
    """Everything a step printed, from its events."""
    payloads = template.events.filter(kind="output", step=step).values_list("payload", flat=True)
    return "".join(str(payload.get("text", "")) for payload in payloads)


def event_step(template: Template, event: HostEvent) -> Any:
    """The event's step, as a queryset of one."""
    return BuildStep.objects.filter(template=template, number=event.data.get("step", 0))


def to_datetime(at: float) -> datetime:
    """A Unix time as the database keeps it."""
    return datetime.fromtimestamp(at, UTC)
