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
from templates_app.events import tell_changed, tell_progress
from templates_app.models import BuildEvent, BuildStep, StepStatus, Template, TemplateStatus
from templates_app.services.direct import past_the_proxy
from templates_app.services.metering import count_build, note_image_bytes

LONGEST_MESSAGE = 16 * 1024
MOST_REFUSED_HOSTS = 40


class Superseded(Exception):  # noqa: N818 - it is news, not a mistake
    """Another driver follows this build now, or the template is gone."""


def record(template: Template, driver: str, event: HostEvent) -> None:
    """Store one event and what follows from it. Raises :class:`Superseded`."""
    try:
        with transaction.atomic():
            # Taken first, and kept: nobody else settles or deletes the template meanwhile.
            held = Template.objects.select_for_update().filter(
                pk=template.pk, driver=driver, status=TemplateStatus.BUILDING
            )
            if not held.exists():
                raise Superseded
            store(template, event)
            HANDLERS.get(event.kind, ignore)(template, event)
    except IntegrityError as error:
        raise Superseded from error


def store(template: Template, event: HostEvent) -> None:
    """Append the host's event. Its own number is unique, so it is never stored twice."""
    append(template, event.kind, event.data, at=moment(event.at), host_seq=event.seq)


def append(
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
    step_of(template, event).update(status=StepStatus.RUNNING, started_at=moment(event.at))
    tell_progress(template.pk)


def step_cached(template: Template, event: HostEvent) -> None:
    """A step is not run again: what it left in an earlier build was taken."""
    data = event.data
    step_of(template, event).update(
        status=StepStatus.CACHED,
        cached_at=moment(data["saved_at"]),
        cached_from=str(data.get("build", "")),
    )
    note_refused(template, event)
    tell_progress(template.pk)


def output(template: Template, event: HostEvent) -> None:
    """A step printed something; whoever watches reads it from the events."""
    tell_progress(template.pk)


def step_finished(template: Template, event: HostEvent) -> None:
    """A step ended: how, and all it printed."""
    data = event.data
    good = data.get("exit_code") == 0 and data.get("signal") is None
    step_of(template, event).update(
        status=StepStatus.SUCCEEDED if good else StepStatus.FAILED,
        duration_ms=data.get("duration_ms"),
        exit_code=data.get("exit_code"),
        signal=data.get("signal"),
        output=printed(template, data.get("step")),
        output_bytes=data.get("output_bytes", 0),
        elided_bytes=data.get("elided_bytes", 0),
        added_bytes=data.get("added_bytes"),
        added_files=data.get("added_files"),
    )
    note_refused(template, event)
    tell_progress(template.pk)


def note_refused(template: Template, event: HostEvent) -> None:
    """What the network policy refused the step, however it ended."""
    refused = event.data.get("refused") or []
    if refused:
        hosts = list(dict.fromkeys(str(one["host"]) for one in refused))
        step_of(template, event).update(refused_hosts=hosts)
        add_refused_hosts(
            template, [str(one["host"]) for one in refused if one.get("can_be_listed")]
        )
        for text in past_the_proxy(refused, "This step"):
            warn(template, event, text)


def add_refused_hosts(template: Template, hosts: Sequence[str]) -> None:
    """Add to what another build could be allowed."""
    row = Template.objects.filter(pk=template.pk)
    known = row.values_list("refused_hosts", flat=True).get()
    together = list(dict.fromkeys([*known, *hosts]))
    row.update(refused_hosts=together[:MOST_REFUSED_HOSTS])


def warned(template: Template, event: HostEvent) -> None:
    """Something that a step did has not the effect that its author may think it has."""
    warn(template, event, str(event.data.get("message", "")))
    tell_progress(template.pk)


def warn(template: Template, event: HostEvent, text: str) -> None:
    """Add a warning to the event's step."""
    for step in step_of(template, event):
        step.warnings = [*step.warnings, text]
        step.save(update_fields=["warnings"])


def contents(template: Template, event: HostEvent) -> None:
    """What the image will hold."""
    Template.objects.filter(pk=template.pk).update(contents=event.data)
    tell_progress(template.pk)


def published(template: Template, event: HostEvent) -> None:
    """The image is there: the template is ready."""
    settle(
        template,
        status=TemplateStatus.READY,
        size_bytes=event.data.get("size_bytes"),
        file_count=event.data.get("file_count"),
        shared_bytes=event.data.get("shared_bytes"),
        build_ms=event.data.get("total_ms"),
        finished_at=moment(event.at),
    )
    note_image_bytes(template.team_id)


def failed(template: Template, event: HostEvent) -> None:
    """The build ended without an image: say why, and which steps never ran."""
    add_refused_hosts(template, event.data.get("refused") or [])
    fail(template, str(event.data.get("code", "internal")), str(event.data.get("message", "")))


def ignore(template: Template, event: HostEvent) -> None:
    """Boot, silence, progress, scrub and capture are kept as events and change nothing."""
    tell_progress(template.pk)


HANDLERS = {
    "step_started": step_started,
    "step_cached": step_cached,
    "output": output,
    "step_finished": step_finished,
    "not_captured": warned,
    "not_reached": warned,
    "contents": contents,
    "published": published,
    "failed": failed,
}


def end(template: Template, code: str, message: str) -> None:
    """End a build from this side, whatever the host still does: the event, then the state.

    The caller's transaction holds the row. From then on no driver records anything of it.
    """
    append(template, "failed", {"code": code, "message": shortened(message)})
    fail(template, code, message)


def fail(template: Template, code: str, message: str) -> None:
    """Settle the template as failed, and the steps that were not to be."""
    for step in template.steps.filter(status=StepStatus.RUNNING):
        step.status = StepStatus.FAILED
        step.output = printed(template, step.number)
        step.output_bytes = step.output_bytes or len(step.output.encode())
        step.save(update_fields=["status", "output", "output_bytes"])
    template.steps.filter(status=StepStatus.PENDING).update(status=StepStatus.SKIPPED)
    settle(
        template,
        status=TemplateStatus.FAILED,
        error_code=code,
        error_message=shortened(message) or "The build failed.",
        finished_at=timezone.now(),
    )


def shortened(message: str) -> str:
    """The message without its middle if it is too long: the step leads, its output's end closes."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    elided = len(message) - 2 * half
    return f"{message[:half]}\n[… {elided:,} characters left out …]\n{message[-half:]}"


def settle(template: Template, **changes: Any) -> None:
    """The one transition out of ``building``. The caller's transaction holds the row."""
    settled = Template.objects.filter(pk=template.pk, status=TemplateStatus.BUILDING)
    if not settled.update(driver="", **changes):
        raise Superseded
    count_build(template)
    tell_changed(template.pk, template.team_id)


def printed(template: Template, step: int | None) -> str:
    """Everything a step printed, from its events."""
    payloads = template.events.filter(kind="output", step=step).values_list("payload", flat=True)
    return "".join(str(payload.get("text", "")) for payload in payloads)


def step_of(template: Template, event: HostEvent) -> Any:
    """The event's step, as a queryset of one."""
    return BuildStep.objects.filter(template=template, number=event.data.get("step", 0))


def moment(at: float) -> datetime:
    """A Unix time as the database keeps it."""
    return datetime.fromtimestamp(at, UTC)
