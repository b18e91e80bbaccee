"""Creating, reading and deleting templates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from django.db import transaction
from django.db.models import Count, OuterRef, Q, StringAgg, Subquery, Sum, TextField, Value
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce, Length, NullIf, Right
from django.utils import timezone
from django_q.tasks import async_task

from hostruntime.errors import InvalidRequest
from hostruntime.image import environment
from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import Envelope, envelope, held
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import Conflict, InvalidInput, NotFound
from orkestr_console.core.ids import is_id
from orkestr_console.http.paging import page
from templates_app.events import notify_changed
from templates_app.models import CANCELLED, BuildEvent, BuildStep, Template, TemplateStatus
from templates_app.services import queue
from templates_app.services.bases import ALIASES, TEMPLATE_ID_PREFIX, Source, resolve
from templates_app.services.metering import count_build
from templates_app.services.record import append_event, fail_build
from templates_app.services.space import LIMIT, MEGABYTE, disk_mb
from templates_app.specs import TemplateSpec

NOT_FOUND = "There is no such template in your team; check the id."
# How much of each step's output a template includes, in characters: a hundred steps stay small.
OUTPUT_TAIL_CHARS = 16 * 1024
# Writing it for every sandbox would make sandboxes that start together wait for each other.
LAST_USED_INTERVAL = timedelta(minutes=1)
FORGET = "templates_app.tasks.forget_image"


@dataclass(frozen=True)
class TemplateUsage:
    """How many of the team's template slots are ``used``."""

    used: int
    limit: int

    @property
    def is_full(self) -> bool:
        """Whether another template would be refused."""
        return self.used >= self.limit


@dataclass(frozen=True)
class StepOutput:
    """A step and the end of its output; ``truncated`` means that there is more before it."""

    step: BuildStep
    output: str
    truncated: bool


@audited("template.create", "template")
def create_template(actor: Actor, spec: TemplateSpec) -> Template:
    """Create a template and queue its build.

    Raises ``InvalidInput``, ``NotFound`` or ``Conflict`` for its base, ``PlanLimit`` when the plan
    has no slot left, ``HostUnavailable``. Nothing is created then.
    """
    actor.require(WRITE)
    actor.require_template(spec.base_template)
    actor.require_network(spec.network)
    source = resolve_base(actor.team, spec.base_template)
    check_environment(source, spec)
    with held(actor.team, actor.user) as limits:
        check_limits(actor, limits, spec)
        check_timeouts(limits, spec)
        team = limits.team
        template = insert(actor, team, spec, source)
        # The queue is in this database, so the task exists if and only if the template does.
        queue.wake_worker()
        mark_used(spec.base_template)
        notify_changed(template.pk, team.pk)
        audit.record(
            actor,
            "template.create",
            kind="template",
            object_id=template.pk,
            name=template.name,
            data={"base": spec.base_template, "steps": len(spec.recipe), "network": spec.network},
        )
    return template


def insert(actor: Actor, team: Team, spec: TemplateSpec, source: Source) -> Template:
    """The rows of a template, its steps, and the first of its events."""
    template = Template.objects.create(
        team=team,
        created_by=actor.user,
        name=spec.name,
        base_template=spec.base_template,
        base_image=source.image_id,
        recipe=spec.recipe,
        network=spec.network,
        allow_domains=spec.allow_domains,
        env=spec.env,
        step_timeout_seconds=spec.step_timeout_seconds,
        build_timeout_seconds=spec.build_timeout_seconds,
        disk_mb=spec.disk_mb,
        reuse=spec.reuse or "",
    )
    BuildStep.objects.bulk_create(
        BuildStep(template=template, number=number, command=command)
        for number, command in enumerate(spec.recipe, start=1)
    )
    append_event(template, "queued", {})
    return template


def resolve_base(team: Team, name: str) -> Source:
    """The base's image. Another team's template is as unknown as one that never existed."""
    try:
        # Its build waits for a base that is made on request.
        return resolve(team, name, field="base_template", can_wait=True)
    except NotFound as error:
        sentence = f"{error.detail} A base image's name, such as 'python-3.12', works too."
        raise InvalidInput(
            f"base_template: {sentence}", fields={"base_template": sentence}
        ) from None


def check_environment(source: Source, spec: TemplateSpec) -> None:
    """Raise ``InvalidInput`` if ``env`` is too large together with the base's environment."""
    try:
        environment.check_environment(environment.merge_baked(source.env, spec.env))
    except InvalidRequest as error:
        raise InvalidInput(f"env: {error.detail}", fields={"env": error.detail}) from None


def check_limits(actor: Actor, limits: Envelope, spec: TemplateSpec) -> None:
    """Raise ``PlanLimit`` unless the team, whose row the caller holds, may have one more."""
    existing = Template.objects.for_team(limits.team).using_slots()
    mine = existing.filter(created_by=actor.user).count() if actor.user else None
    limits.require_room("max_templates", existing.count(), mine)
    # However many builds run, another can be queued, unless the limit is 0.
    limits.require_room("max_concurrent_builds", 0)
    limits.require_room(LIMIT, disk_mb(limits.team))
    limits.require_network(spec.network)
    if spec.allow_domains is not None:
        limits.require_allowlist()
    if not spec.base_template.startswith(TEMPLATE_ID_PREFIX):
        limits.require_base(ALIASES.get(spec.base_template, spec.base_template))


def check_timeouts(limits: Envelope, spec: TemplateSpec) -> None:
    """Raise ``PlanLimit`` for a step or build timeout above the plan's."""
    for name in ("step_timeout_seconds", "build_timeout_seconds"):
        requested: int | None = getattr(spec, name)
        if requested is not None:
            limits.require_at_most(name, requested, name)


def get_template(actor: Actor, template_id: str) -> Template:
    """One of the team's templates. Raises ``NotFound``."""
    actor.require(READ)
    if not is_id("tmpl", template_id):
        raise NotFound(NOT_FOUND)
    row = Template.objects.for_team(actor.team).filter(pk=template_id).first()
    if row is None:
        raise NotFound(NOT_FOUND)
    return row


def list_steps(template: Template) -> list[StepOutput]:
    """The steps of a build, each with the end of its output so far."""
    events = BuildEvent.objects.filter(
        template=OuterRef("template"), step=OuterRef("number"), kind="output"
    )
    # A running step's output is only in its events.
    printed = (
        events.order_by()
        .values("step")
        .annotate(text=StringAgg(Cast(KT("payload__text"), TextField()), Value(""), order_by="seq"))
    )
    blank = Value("", output_field=TextField())
    whole = Coalesce(NullIf("output", blank), Subquery(printed.values("text")), blank)
    rows = (
        template.steps.defer("output")
        .annotate(whole=whole)
        .annotate(shown=Right("whole", OUTPUT_TAIL_CHARS), more=Length("whole") - OUTPUT_TAIL_CHARS)
    )
    return [StepOutput(row, row.shown, row.more > 0) for row in rows]


def list_templates(
    actor: Actor,
    *,
    failed: bool | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> tuple[list[Template], str | None]:
    """The team's templates, newest first, and the cursor of the next page or None.

    Only those whose build ``failed``, or only the others.
    """
    actor.require(READ)
    rows = Template.objects.for_team(actor.team)
    if failed is not None:
        rows = rows.filter(status=TemplateStatus.FAILED) if failed else rows.using_slots()
    return page(rows, limit, cursor)


@audited("template.cancel", "template")
def cancel_template(actor: Actor, template_id: str) -> Template:
    """Cancel a build: the template fails immediately, whatever the host still does.

    A second call changes nothing. Raises ``NotFound``, ``Conflict`` for a build that is over.
    """
    actor.require(WRITE)
    with transaction.atomic():
        template = lock_template(actor, template_id)
        if template.status != TemplateStatus.BUILDING:
            return refuse_unless_cancelled(template)
        fail_build(
            template, CANCELLED, f"The build was cancelled by {audit.actor_description(actor)}."
        )
        audit.record(
            actor, "template.cancel", kind="template", object_id=template.pk, name=template.name
        )
        async_task(FORGET, template.image_id, group="images")
    template.refresh_from_db()
    return template


def refuse_unless_cancelled(template: Template) -> Template:
    """Return a cancelled template as it is; raise ``Conflict`` for any other finished build."""
    if template.error_code == CANCELLED:
        return template
    outcome = "is ready; delete it" if template.is_ready else "has failed already; delete it"
    raise Conflict(
        f"There is no build to cancel: template '{template.name}' {outcome} if you do not want it.",
        code="build_ended",
    )


def lock_template(actor: Actor, template_id: str) -> Template:
    """One of the team's templates, its row locked. Raises ``NotFound``."""
    if not is_id("tmpl", template_id):
        raise NotFound(NOT_FOUND)
    rows = Template.objects.for_team(actor.team).select_for_update(of=("self",))
    template = rows.filter(pk=template_id).first()
    if template is None:
        raise NotFound(NOT_FOUND)
    return template


@audited("template.delete", "template")
def delete_template(actor: Actor, template_id: str) -> None:
    """Delete a template, cancelling its build if that is not over. Raises ``NotFound``.

    Its slot is free immediately; its image is removed once no sandbox runs from it.
    """
    actor.require(WRITE)
    with transaction.atomic():
        template = lock_template(actor, template_id)
        team_id, image_id = template.team_id, template.image_id
        if not template.state.is_terminal:
            # Its build ends now; a finished one was counted when it finished.
            count_build(template, until=timezone.now())
        template.delete()
        audit.record(
            actor, "template.delete", kind="template", object_id=template_id, name=template.name
        )
        # This kills its step and removes its image; nothing its driver still receives is recorded.
        async_task(FORGET, image_id, group="images")
        notify_changed(template_id, team_id)


def mark_used(template_id: str) -> None:
    """Record that a template was used now, at most once a minute. Ignores a base's name."""
    now = timezone.now()
    stale = Q(last_used_at=None) | Q(last_used_at__lt=now - LAST_USED_INTERVAL)
    Template.objects.filter(stale, pk=template_id).update(last_used_at=now)


def usage_counts(teams: Iterable[Team]) -> dict[str, dict[str, int]]:
    """Each team's usage of the limits on templates, by team id and limit."""
    ready = Q(status=TemplateStatus.READY)
    rows = (
        Template.objects.using_slots()
        .filter(team__in=teams)
        .values("team")
        .annotate(
            kept=Count("pk"),
            building=Count(
                "pk", filter=Q(status=TemplateStatus.BUILDING, started_at__isnull=False)
            ),
            size=Coalesce(Sum("size_bytes", filter=ready), 0),
            shared=Coalesce(Sum("shared_bytes", filter=ready), 0),
        )
    )
    zero = {"max_templates": 0, "max_concurrent_builds": 0, LIMIT: 0}
    used = {
        row["team"]: {
            "max_templates": row["kept"],
            "max_concurrent_builds": row["building"],
            LIMIT: (row["size"] - row["shared"]) // MEGABYTE,
        }
        for row in rows
    }
    return {team.pk: used.get(team.pk, zero) for team in teams}


def template_usage(actor: Actor) -> TemplateUsage:
    """How many of the plan's template slots the team uses."""
    used = Template.objects.for_team(actor.team).using_slots().count()
    return TemplateUsage(used, envelope(actor.team).value("max_templates"))
