"""Creating, reading and deleting templates."""

from __future__ import annotations

from dataclasses import dataclass

from django.db import transaction
from django.db.models import OuterRef, StringAgg, Subquery, TextField, Value
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Coalesce, Length, NullIf, Right
from django_q.tasks import async_task

from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.models import Plan, Team
from orkestr_console.errors import InvalidInput, NotFound, PlanLimit
from orkestr_console.ids import is_id
from orkestr_console.services.paging import page
from templates_app.events import tell_changed
from templates_app.models import BuildEvent, BuildStep, Template
from templates_app.services.bases import Source, resolve
from templates_app.specs import TemplateSpec

NO_SUCH = "There is no such template in your team; check the id."
# How much of each step's output goes with a template, in characters: a hundred steps stay small.
SHOWN_OUTPUT = 16 * 1024


@dataclass(frozen=True)
class TemplateUsage:
    """How many of the plan's template slots are ``used``."""

    used: int
    limit: int

    @property
    def is_full(self) -> bool:
        """Whether another template would be refused."""
        return self.used >= self.limit


@dataclass(frozen=True)
class ShownStep:
    """A step and the end of what it printed; ``truncated`` says that there is more before."""

    step: BuildStep
    output: str
    truncated: bool


def create_template(actor: Actor, spec: TemplateSpec) -> Template:
    """A new template, building.

    Raises ``InvalidInput``, ``NotFound`` or ``Conflict`` for its base, ``PlanLimit`` when the plan
    has no slot left, ``HostUnavailable``. Nothing is created then.
    """
    actor.require(WRITE)
    source = resolve_base(actor.team, spec.base_template)
    with transaction.atomic():
        team = (
            Team.objects.select_for_update(of=("self",))
            .select_related("plan")
            .get(pk=actor.team.pk)
        )
        check_plan(team, spec)
        template = Template.objects.create(
            team=team,
            created_by=actor.user,
            name=spec.name,
            base_template=spec.base_template,
            base_image=source.image_id,
            recipe=spec.recipe,
            network=spec.network,
        )
        BuildStep.objects.bulk_create(
            BuildStep(template=template, number=number, command=command)
            for number, command in enumerate(spec.recipe, start=1)
        )
        # The queue is in this database, so the task exists exactly if the template does.
        async_task("templates_app.tasks.drive_build", template.pk, group="builds")
        tell_changed(template.pk, team.pk)
    return template


def resolve_base(team: Team, name: str) -> Source:
    """The base's image. Somebody else's template is as unknown as one that never was."""
    try:
        return resolve(team, name, field="base_template")
    except NotFound as error:
        sentence = f"{error.detail} A base image's name, such as 'python-3.12', works too."
        raise InvalidInput(
            f"base_template: {sentence}", fields={"base_template": sentence}
        ) from None


def check_plan(team: Team, spec: TemplateSpec) -> None:
    """Raise ``PlanLimit`` unless the team, whose row the caller holds, may have one more."""
    plan: Plan = team.plan
    if plan.max_templates == 0:
        raise PlanLimit(
            f"Custom templates are not part of the {plan.name} plan; ask your administrator to "
            "move the team to a paid plan."
        )
    used = Template.objects.for_team(team).counted().count()
    if used >= plan.max_templates:
        raise PlanLimit(
            f"Your team keeps {used} of the {plan.max_templates} templates that the {plan.name} "
            "plan allows; delete one you no longer need, or ask your administrator for a larger "
            "plan."
        )
    if spec.network == "open" and not plan.allow_open_network:
        raise PlanLimit(
            f"The {plan.name} plan does not include the open network; use 'restricted', or ask "
            "your administrator for a larger plan."
        )


def get_template(actor: Actor, template_id: str) -> Template:
    """One of the team's templates. Raises ``NotFound``."""
    actor.require(READ)
    if not is_id("tmpl", template_id):
        raise NotFound(NO_SUCH)
    row = Template.objects.for_team(actor.team).filter(pk=template_id).first()
    if row is None:
        raise NotFound(NO_SUCH)
    return row


def list_steps(template: Template) -> list[ShownStep]:
    """The steps of a build, each with its output so far, of which the end is kept."""
    events = BuildEvent.objects.filter(
        template=OuterRef("template"), step=OuterRef("number"), kind="output"
    )
    # What a running step printed is in the events alone until it ends.
    told = (
        events.order_by()
        .values("step")
        .annotate(text=StringAgg(Cast(KT("payload__text"), TextField()), Value(""), order_by="seq"))
    )
    blank = Value("", output_field=TextField())
    whole = Coalesce(NullIf("output", blank), Subquery(told.values("text")), blank)
    rows = (
        template.steps.defer("output")
        .annotate(whole=whole)
        .annotate(shown=Right("whole", SHOWN_OUTPUT), more=Length("whole") - SHOWN_OUTPUT)
    )
    return [ShownStep(row, row.shown, row.more > 0) for row in rows]


def list_templates(
    actor: Actor, *, limit: int | None = None, cursor: str | None = None
) -> tuple[list[Template], str | None]:
    """The team's templates, newest first, and the cursor of the next page or None."""
    actor.require(READ)
    return page(Template.objects.for_team(actor.team), limit, cursor)


def delete_template(actor: Actor, template_id: str) -> None:
    """Delete a template, ending its build first if it has not ended. Raises ``NotFound``.

    Its slot is free at once; its image goes once no sandbox runs from it.
    """
    actor.require(WRITE)
    if not is_id("tmpl", template_id):
        raise NotFound(NO_SUCH)
    with transaction.atomic():
        rows = Template.objects.for_team(actor.team).select_for_update(of=("self",))
        template = rows.filter(pk=template_id).first()
        if template is None:
            raise NotFound(NO_SUCH)
        team_id, image_id = template.team_id, template.image_id
        template.delete()
        async_task("templates_app.tasks.forget_image", image_id, group="images")
        tell_changed(template_id, team_id)


def template_usage(actor: Actor) -> TemplateUsage:
    """How full the team's plan is."""
    used = Template.objects.for_team(actor.team).counted().count()
    return TemplateUsage(used, actor.team.plan.max_templates)
