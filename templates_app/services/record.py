"""Recording a build's events: the only place where a building template changes.

Every change is a compare-and-set that names the driver, so a superseded driver writes nothing more,
and the event's row is in the same transaction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from django.db import IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone

from hostruntime.wire.builds import BuildEvent as HostEvent
from orkestr_console.http.json_api import timestamp
from orkestr_console.webhooks import outbox
from orkestr_console.webhooks.models import EventType
from templates_app.events import notify_changed, notify_progress
from templates_app.models import BuildEvent, BuildStep, StepStatus, Template, TemplateStatus
from templates_app.services.direct import bypass_advice
from templates_app.services.metering import count_build, note_image_bytes
from templates_app.services.space import why_no_room

MAX_MESSAGE_CHARS = 16 * 1024
MAX_REFUSED_HOSTS = 40
# The part of a failure's message that webhooks are told: the template has the rest.
MAX_TOLD_CHARS = 2000
# Of this side's own: a line about a base that is made on request.
BASE_EVENT = "base"
MAX_BASE_CHARS = 500


class Superseded(Exception):  # noqa: N818 - not an error
    """Another driver follows this build now, or the template was deleted."""


@contextmanager
def driving_row(template: Template, driver: str) -> Iterator[None]:
    """A transaction with the row locked. Raises :class:`Superseded` if it is another's."""
    with transaction.atomic():
        # Locked first, so that nobody else settles or deletes the template meanwhile.
        locked = Template.objects.select_for_update().filter(
            pk=template.pk, driver=driver, status=TemplateStatus.BUILDING
        )
        if not locked.exists():
            raise Superseded
        yield


def require_driver(template: Template, driver: str) -> None:
    """Raise :class:`Superseded` unless the build is still this driver's."""
    with driving_row(template, driver):
        pass


def record(template: Template, driver: str, event: HostEvent) -> None:
    """Store one event and apply its effects. Raises :class:`Superseded`."""
    try:
        with driving_row(template, driver):
            if event.kind == "published" and (reason := why_no_room(template.team)):
                fail_build(template, "plan_limit", reason)
                return
            store_event(template, event)
            HANDLERS.get(event.kind, ignore)(template, event)
    except IntegrityError as error:
        raise Superseded from error


def record_base(template: Template, driver: str, message: str) -> None:
    """Store how far the base is that the build waits for. Raises :class:`Superseded`."""
    with driving_row(template, driver):
        append_event(template, BASE_EVENT, {"message": message[:MAX_BASE_CHARS]})
        notify_progress(template.pk)


def record_waited(template: Template, driver: str) -> None:
    """Have a build start now that its base is ready: it did nothing while it waited for that.

    Raises :class:`Superseded`.
    """
    with driving_row(template, driver):
        Template.objects.filter(pk=template.pk).update(started_at=timezone.now())


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
    """Append an event under the next number. The caller has locked the template's row."""
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
    """A step started."""
    event_step(template, event).update(status=StepStatus.RUNNING, started_at=to_datetime(event.at))
    notify_progress(template.pk)


def step_cached(template: Template, event: HostEvent) -> None:
    """A step was not run: an earlier build's result was reused."""
    data = event.data
    event_step(template, event).update(
        status=StepStatus.CACHED,
        cached_at=to_datetime(data["saved_at"]),
        cached_from=str(data.get("build", "")),
    )
    record_refused_hosts(template, event)
    notify_progress(template.pk)


def output(template: Template, event: HostEvent) -> None:
    """A step printed something; viewers read it from the events."""
    notify_progress(template.pk)


def step_finished(template: Template, event: HostEvent) -> None:
    """A step finished: store its result and all its output."""
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
    """Store which hosts the network policy refused to the step, whatever its result."""
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
    """Add to the hosts that a rebuild could allow."""
    row = Template.objects.filter(pk=template.pk)
    known = row.values_list("refused_hosts", flat=True).get()
    hosts_seen = list(dict.fromkeys([*known, *hosts]))
    row.update(refused_hosts=hosts_seen[:MAX_REFUSED_HOSTS])


def step_warned(template: Template, event: HostEvent) -> None:
    """Something that a step did has no lasting effect."""
    add_warning(template, event, str(event.data.get("message", "")))
    notify_progress(template.pk)


def add_warning(template: Template, event: HostEvent, text: str) -> None:
    """Add a warning to the event's step."""
    for step in event_step(template, event):
        step.warnings = [*step.warnings, text]
        step.save(update_fields=["warnings"])


def contents(template: Template, event: HostEvent) -> None:
    """What the image will contain."""
    Template.objects.filter(pk=template.pk).update(contents=event.data)
    notify_progress(template.pk)


def published(template: Template, event: HostEvent) -> None:
    """The image is published: the template is ready."""
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
    """The build failed: store why, and which steps never ran."""
    add_refused_hosts(template, event.data.get("refused") or [])
    mark_failed(
        template, str(event.data.get("code", "internal")), str(event.data.get("message", ""))
    )


def ignore(template: Template, event: HostEvent) -> None:
    """Boot, silence, progress, scrub and capture are stored as events and change nothing else."""
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
    """Fail a build from this side, whatever the host still does: the event, then the state.

    The caller has locked the row. From then on no driver records anything for it.
    """
    append_event(template, "failed", {"code": code, "message": truncate_middle(message)})
    mark_failed(template, code, message)


def mark_failed(template: Template, code: str, message: str) -> None:
    """Settle the template as failed, and its remaining steps."""
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
    """The message without its middle if it is too long: the step comes first, its output last."""
    if len(message) <= MAX_MESSAGE_CHARS:
        return message
    half = MAX_MESSAGE_CHARS // 2
    elided = len(message) - 2 * half
    return f"{message[:half]}\n[… {elided:,} characters left out …]\n{message[-half:]}"


def settle(template: Template, **changes: Any) -> None:
    """The only transition out of ``building``. The caller has locked the row."""
    rows = Template.objects.filter(pk=template.pk, status=TemplateStatus.BUILDING)
    if not rows.update(driver="", **changes):
        raise Superseded
    count_build(template)
    announce(template, **changes)
    notify_changed(template.pk, template.team_id)


def announce(template: Template, status: str, finished_at: datetime, **changes: Any) -> None:
    """Add the end of the build to the webhooks' outbox."""
    data = {
        "template_id": template.pk,
        "name": template.name,
        "status": status,
        "error_code": changes.get("error_code"),
        "error_message": (changes.get("error_message") or "")[:MAX_TOLD_CHARS] or None,
        "finished_at": timestamp(finished_at),
    }
    outbox.put(template.team_id, EventType.BUILD_FINISHED, template.pk, data)


def output_from_events(template: Template, step: int | None) -> str:
    """Everything a step printed, from its events."""
    payloads = template.events.filter(kind="output", step=step).values_list("payload", flat=True)
    return "".join(str(payload.get("text", "")) for payload in payloads)


def event_step(template: Template, event: HostEvent) -> Any:
    """The event's step, as a queryset of one."""
    return BuildStep.objects.filter(template=template, number=event.data.get("step", 0))


def to_datetime(at: float) -> datetime:
    """A Unix time as an aware datetime."""
    return datetime.fromtimestamp(at, UTC)
