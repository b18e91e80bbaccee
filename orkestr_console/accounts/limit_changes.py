"""Changes of a team's limits by its admins, and of plans and teams by an operator.

They take effect immediately: every check reads the same rows. Lowering a limit below current usage
blocks new resources but doesn't end existing ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from django.db import models, transaction
from django.utils import timezone
from django.utils.text import slugify
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from orkestr_console.accounts import audit
from orkestr_console.accounts.actor import EVERYTHING, Actor
from orkestr_console.accounts.audit import audited
from orkestr_console.accounts.limits import KINDS, SHARES, Envelope, hold, networks_of
from orkestr_console.accounts.models import Agreement, Plan, Role, Team, TeamLimits, User
from orkestr_console.accounts.models.plans import MAX_BUILD_SECONDS
from orkestr_console.core.errors import InvalidInput, NotFound
from orkestr_console.core.text import readable

# PostgreSQL's integer.
MAX_NUMBER = 2**31 - 1
# Limits that make no sense at zero.
MINIMUMS = {
    "max_timeout_seconds": 10,
    "step_timeout_seconds": 1,
    "build_timeout_seconds": 1,
    "api_requests_per_minute": 1,
}
MAXIMUMS = {
    "step_timeout_seconds": MAX_BUILD_SECONDS,
    "build_timeout_seconds": MAX_BUILD_SECONDS,
}
SIZES = ("small", "medium", "large")

type Amount = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
type Name = Annotated[str, Field(min_length=1, max_length=100), AfterValidator(readable)]
type Numbers = dict[str, Amount | None]


class LimitsSpec(BaseModel):
    """A team's own limits; None means up to the ceiling, or everything offered."""

    model_config = ConfigDict(extra="forbid")

    numbers: Numbers = Field(default_factory=dict)
    shares: Numbers = Field(default_factory=dict)
    sizes: list[str] | None = None
    networks: list[str] | None = None
    bases: list[str] | None = None


class AgreementSpec(BaseModel):
    """Ceilings agreed with one team; None means its plan's."""

    model_config = ConfigDict(extra="forbid")

    plan: str
    numbers: Numbers = Field(default_factory=dict)
    note: Annotated[str, Field(max_length=2000)] = ""


class PlanSpec(BaseModel):
    """What a plan allows."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    numbers: dict[str, Amount]
    sizes: list[str]
    allow_open_network: bool
    custom_egress_allowlist: bool


class NewTeamSpec(BaseModel):
    """A team to create."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    name: Name
    plan: str


@audited("limits.set", "team")
def set_team_limits(actor: Actor, spec: LimitsSpec) -> Envelope:
    """Set the team's own limits, up to its ceilings.

    Raises ``Forbidden`` for a member, ``InvalidInput`` naming each number that is out of range.
    """
    actor.require_role(Role.ADMIN)
    with transaction.atomic():
        limits = hold(actor.team)
        raise_problems(limits_problems(limits, spec))
        changes: dict[str, Any] = {
            **pick(spec.numbers, KINDS),
            **{f"member_{name}": value for name, value in pick(spec.shares, SHARES).items()},
            "allowed_sizes": spec.sizes,
            "allowed_networks": spec.networks,
            "allowed_bases": spec.bases,
        }
        row = TeamLimits.objects.filter(team=actor.team).first() or TeamLimits(team=actor.team)
        changed = apply_changes(row, changes)
        row.updated_at, row.updated_by = timezone.now(), actor.user
        row.save()
        audit.record(
            actor,
            "limits.set",
            kind="team",
            object_id=actor.team.pk,
            name=actor.team.name,
            data={"changed": changed},
        )
        return hold(actor.team)


def limits_problems(limits: Envelope, spec: LimitsSpec) -> dict[str, str]:
    """The invalid fields of ``spec``, with the reason."""
    problems = range_problems({**spec.numbers})
    for name, value in spec.numbers.items():
        limit = limits.numbers.get(name)
        if name not in problems and limit and value is not None and value > limit.ceiling:
            origin = (
                "was agreed for your team" if limit.agreed else f"the {limits.plan.name} plan has"
            )
            problems[name] = (
                f"can be at most {limit.ceiling:,}, which {origin}; only an operator raises it."
            )
    offered = {
        "sizes": (spec.sizes, limits.plan.allowed_sizes),
        "networks": (spec.networks, networks_of(limits.plan)),
    }
    for field, (chosen, known) in offered.items():
        if (problem := choice_problem(chosen, known)) is not None:
            problems[field] = problem
    if spec.bases is not None and not spec.bases:
        problems["bases"] = "must keep at least one."
    return problems


def choice_problem(chosen: Sequence[str] | None, offered: Sequence[str]) -> str | None:
    """Why ``chosen`` is not a valid selection of what is offered; None if it is."""
    if chosen is None:
        return None
    unknown = [name for name in chosen if name not in offered]
    if unknown:
        return f"has {unknown[0]!r}; the plan offers {', '.join(offered)}."
    return None if chosen else "must keep at least one."


def range_problems(numbers: Mapping[str, int | None]) -> dict[str, str]:
    """The numbers that are out of range or not a limit, with the reason."""
    problems = {name: "is not a limit." for name in numbers if name not in KINDS}
    for name, value in numbers.items():
        if value is None:
            continue
        if value < MINIMUMS.get(name, 0):
            problems[name] = f"must be at least {MINIMUMS[name]}."
        elif value > MAXIMUMS.get(name, MAX_NUMBER):
            problems[name] = f"must be at most {MAXIMUMS[name]:,}."
    return problems


def raise_problems(problems: Mapping[str, str]) -> None:
    """Raise ``InvalidInput`` if there are any."""
    if problems:
        name, sentence = next(iter(problems.items()))
        raise InvalidInput(f"{name} {sentence}", fields=dict(problems))


def pick(numbers: Mapping[str, int | None], names: Iterable[str]) -> dict[str, int | None]:
    """A value for each name; None where there is none."""
    return {name: numbers.get(name) for name in names}


def apply_changes(row: models.Model, changes: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Set the fields; returns the old and new values of those that changed."""
    before = {name: getattr(row, name) for name in changes}
    for name, value in changes.items():
        setattr(row, name, value)
    return {name: [before[name], value] for name, value in changes.items() if before[name] != value}


@dataclass(frozen=True, slots=True)
class Operator:
    """A person who runs this server, whatever their team. Created by :func:`require_operator`.

    ``home`` is the team they currently act for: refusals that concern no team are recorded there.
    """

    user: User
    address: str | None
    home: Team | None = None

    def acting_for(self, team: Team) -> Actor:
        """The operator acting for a team, as an owner would."""
        scopes = frozenset({EVERYTHING})
        return Actor(team, self.user, None, "console", self.address, scopes, Role.OWNER)


def require_operator(user: User, address: str | None, home: Team | None = None) -> Operator:
    """The operator. Raises ``NotFound`` for anybody else, so that they learn nothing."""
    if not user.is_staff:
        raise NotFound
    return Operator(user, address, home)


@contextmanager
def record_refusals(
    operator: Operator, action: str, kind: str, object_id: str = ""
) -> Iterator[None]:
    """Record a refusal from the block for the operator's team, if they act for one."""
    if operator.home is None:
        yield
        return
    with audit.denials(operator.acting_for(operator.home), action, kind, object_id):
        yield


def list_teams(_: Operator, text: str = "") -> list[Team]:
    """Every team that matches ``text`` by name, slug or id, with its plan and number of people."""
    found = Team.objects.select_related("plan").annotate(people=models.Count("memberships"))
    if text:
        named = models.Q(name__icontains=text) | models.Q(slug__icontains=text)
        found = found.filter(named | models.Q(pk=text))
    return list(found.order_by("name", "pk"))


def get_team(_: Operator, team_id: str) -> Team:
    """One team. Raises ``NotFound``."""
    team = Team.objects.select_related("plan", "agreement", "limits").filter(pk=team_id).first()
    if team is None:
        raise NotFound("There is no such team.")
    return team


def list_plans(_: Operator | Actor) -> list[Plan]:
    """Every plan, smallest first."""
    return list(Plan.objects.order_by("max_templates", "max_concurrent_sandboxes", "code"))


def get_plan(_: Operator, code: str) -> Plan:
    """One plan. Raises ``NotFound``."""
    plan = Plan.objects.filter(pk=code).first()
    if plan is None:
        raise NotFound("There is no such plan.")
    return plan


def set_agreement(operator: Operator, team_id: str, spec: AgreementSpec) -> Team:
    """Put a team on a plan, with its own ceilings where set. Raises ``InvalidInput``."""
    team = get_team(operator, team_id)
    actor = operator.acting_for(team)
    with audit.denials(actor, "plan.set", "team", team.pk), transaction.atomic():
        hold(team)
        plan = require_plan(spec.plan)
        raise_problems(range_problems(spec.numbers))
        row = Agreement.objects.filter(team=team).first() or Agreement(team=team)
        changed = apply_changes(row, {**pick(spec.numbers, KINDS), "note": spec.note})
        row.save()
        if team.plan_id != plan.pk:
            changed["plan"] = [team.plan_id, plan.pk]
            Team.objects.filter(pk=team.pk).update(plan=plan)
        data = {"changed": changed}
        audit.record(actor, "plan.set", kind="team", object_id=team.pk, name=team.name, data=data)
    return get_team(operator, team_id)


def require_plan(code: str) -> Plan:
    """The plan with this code. Raises ``InvalidInput``."""
    plan = Plan.objects.filter(pk=code).first()
    if plan is None:
        known = ", ".join(Plan.objects.values_list("code", flat=True))
        raise InvalidInput(f"plan: there are {known}.", fields={"plan": f"must be one of {known}."})
    return plan


def edit_plan(operator: Operator, code: str, spec: PlanSpec) -> Plan:
    """Change what a plan allows, for every team on it. Raises ``InvalidInput``, ``NotFound``."""
    with record_refusals(operator, "plan.edit", "plan", code), transaction.atomic():
        missing_numbers = {name: "is required." for name in KINDS if name not in spec.numbers}
        wrong_sizes = choice_problem(spec.sizes, SIZES)
        problems = {**missing_numbers, **range_problems(spec.numbers)}
        raise_problems({**problems, **({"sizes": wrong_sizes} if wrong_sizes else {})})
        plan = Plan.objects.select_for_update().filter(pk=code).first()
        if plan is None:
            raise NotFound("There is no such plan.")
        changed = apply_changes(
            plan,
            {
                "name": spec.name,
                **spec.numbers,
                "allowed_sizes": [size for size in SIZES if size in spec.sizes],
                "allow_open_network": spec.allow_open_network,
                "custom_egress_allowlist": spec.custom_egress_allowlist,
            },
        )
        plan.save()
        for team in Team.objects.filter(plan=plan):
            data = {"changed": changed}
            audit.record(
                operator.acting_for(team),
                "plan.edit",
                kind="plan",
                object_id=code,
                name=plan.name,
                data=data,
            )
    return plan


def create_team(operator: Operator, spec: NewTeamSpec) -> Team:
    """Create a team without members. Raises ``InvalidInput`` for an unknown plan.

    The caller records refusals (:func:`record_refusals`), around everything else it does with it.
    """
    with transaction.atomic():
        plan = require_plan(spec.plan)
        team = Team.objects.create(name=spec.name, slug=free_slug(spec.name), plan=plan)
        data = {"plan": plan.pk}
        audit.record(
            operator.acting_for(team),
            "team.create",
            kind="team",
            object_id=team.pk,
            name=team.name,
            data=data,
        )
    return team


def free_slug(name: str) -> str:
    """An unused short name for URLs and commands."""
    stem = slugify(name)[:50] or "team"
    taken = set(Team.objects.filter(slug__startswith=stem).values_list("slug", flat=True))
    numbered = (f"{stem}-{number}" for number in range(2, len(taken) + 3))
    return next(slug for slug in (stem, *numbered) if slug not in taken)
