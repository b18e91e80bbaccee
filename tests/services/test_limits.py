"""Plan, agreement, the team's own limits and shares: which number counts, and whom to ask."""

from __future__ import annotations

from typing import Any

import pytest

from orkestr_console.accounts import limit_changes
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limit_changes import (
    AgreementSpec,
    LimitsSpec,
    NewTeamSpec,
    Operator,
    PlanSpec,
)
from orkestr_console.accounts.limits import KINDS, envelope
from orkestr_console.accounts.models import (
    AuditEntry,
    Membership,
    Outcome,
    Plan,
    Team,
    User,
)
from orkestr_console.accounts.services import user_actor
from orkestr_console.core.errors import Forbidden, InvalidInput, NotFound, PlanLimit
from sandboxes_app import services as sandboxes
from sandboxes_app.specs import SandboxSpec
from templates_app import services as templates
from templates_app.models import Template, TemplateStatus
from templates_app.specs import TemplateSpec
from tests.fakes.host import FakeHost

SPEC = TemplateSpec(name="tools", base_template="debian-12", recipe=["true"])


@pytest.fixture
def operator(db: None) -> Operator:
    root = User.objects.create_superuser("root@example.org", "x", name="Root")
    return limit_changes.require_operator(root, "192.0.2.9")


def limits(**numbers: int | None) -> LimitsSpec:
    return LimitsSpec(numbers=numbers)


def numbers_of(plan: Plan) -> dict[str, int]:
    return {name: getattr(plan, name) for name in KINDS}


def test_a_teams_own_limit_counts_at_once_and_says_whom_to_ask(
    host: FakeHost, console_actor: Actor, actor: Actor
) -> None:
    templates.create_template(console_actor, SPEC)
    limit_changes.set_team_limits(console_actor, limits(max_templates=1))
    with pytest.raises(PlanLimit) as caught:
        templates.create_template(actor, SPEC)
    said = caught.value.detail
    assert "is using 1 of the 1 templates that your team's admins allow" in said
    assert "ask Alice (alice@example.org) to raise the limit" in said
    limit_changes.set_team_limits(console_actor, limits(max_templates=2))
    templates.create_template(actor, SPEC)


def test_lowering_below_use_ends_nothing(host: FakeHost, console_actor: Actor) -> None:
    kept = templates.create_template(console_actor, SPEC)
    limit_changes.set_team_limits(console_actor, limits(max_templates=0))
    kept.refresh_from_db()
    assert kept.status == TemplateStatus.BUILDING
    with pytest.raises(PlanLimit, match="is using 1 of the 0 templates"):
        templates.create_template(console_actor, SPEC)


def test_a_failed_build_gives_its_slot_back(host: FakeHost, console_actor: Actor) -> None:
    limit_changes.set_team_limits(console_actor, limits(max_templates=1))
    first = templates.create_template(console_actor, SPEC)
    Template.objects.filter(pk=first.pk).update(status=TemplateStatus.FAILED)
    second = templates.create_template(console_actor, SPEC)
    with pytest.raises(PlanLimit):
        templates.create_template(console_actor, SPEC)
    templates.delete_template(console_actor, second.pk)
    templates.create_template(console_actor, SPEC)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max_templates", 16, "can be at most 15, which the Team plan has"),
        ("max_timeout_seconds", 9, "must be at least 10"),
        ("build_timeout_seconds", 0, "must be at least 1"),
        ("api_requests_per_minute", 0, "must be at least 1"),
        ("max_kittens", 1, "is not a limit"),
    ],
)
def test_a_number_out_of_range_is_refused_at_its_field(
    console_actor: Actor, name: str, value: int, sentence: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        limit_changes.set_team_limits(console_actor, limits(**{name: value}))
    assert sentence in (caught.value.fields or {})[name]
    assert envelope(console_actor.team).value("max_templates") == 15


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sizes": ["small", "huge"]}, "sizes"),
        ({"networks": []}, "networks"),
        ({"networks": ["lan"]}, "networks"),
        ({"bases": []}, "bases"),
    ],
)
def test_a_choice_that_is_none_is_refused(
    console_actor: Actor, change: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        limit_changes.set_team_limits(console_actor, LimitsSpec(**change))
    assert list(caught.value.fields or {}) == [field]


def test_networks_sizes_and_bases_are_restricted_everywhere(
    host: FakeHost, console_actor: Actor, actor: Actor
) -> None:
    only = LimitsSpec(sizes=["small"], networks=["off"], bases=["debian-12"])
    limit_changes.set_team_limits(console_actor, only)
    base = "debian-12"
    for spec, what in (
        (SandboxSpec(template=base, size="medium"), "the size 'medium'"),
        (SandboxSpec(template=base, network="restricted"), "the network 'restricted'"),
        (SandboxSpec(template="python-3.12"), "the base image 'python-3.12'"),
    ):
        with pytest.raises(PlanLimit, match=f"admins do not allow {what}.*Alice"):
            sandboxes.create_sandbox(actor, spec)
    assert sandboxes.create_sandbox(actor, SandboxSpec(template=base)).status == "running"


def test_a_member_may_not_set_limits_and_the_try_is_on_record(bob: User) -> None:
    member = user_actor(bob, None, None)
    with pytest.raises(Forbidden):
        limit_changes.set_team_limits(member, limits(max_templates=1))
    entry = AuditEntry.objects.get(action="limits.set")
    assert (entry.outcome, entry.who) == (Outcome.DENIED, "bob@example.org")


def test_a_token_does_no_admins_work(actor: Actor) -> None:
    with pytest.raises(Forbidden):
        limit_changes.set_team_limits(actor, limits(max_templates=1))


def test_a_general_share_counts_for_each_person_and_a_personal_one_before_it(
    host: FakeHost, console_actor: Actor, bob: User
) -> None:
    limit_changes.set_team_limits(console_actor, LimitsSpec(shares={"max_templates": 1}))
    member = user_actor(bob, None, None)
    templates.create_template(member, SPEC)
    with pytest.raises(PlanLimit, match="Your personal limit is 1 templates and you have 1"):
        templates.create_template(member, SPEC)
    templates.create_template(console_actor, SPEC)
    Membership.objects.filter(user=bob).update(max_templates=2)
    templates.create_template(member, SPEC)


def test_what_changed_is_on_record(console_actor: Actor) -> None:
    limit_changes.set_team_limits(console_actor, limits(max_templates=3))
    entry = AuditEntry.objects.get()
    assert entry.data == {"changed": {"max_templates": [None, 3]}}
    assert (entry.action, entry.who) == ("limits.set", "alice@example.org")


def test_an_agreement_raises_the_ceiling_and_only_an_operator_makes_one(
    operator: Operator, console_actor: Actor, alice: User
) -> None:
    with pytest.raises(NotFound):
        limit_changes.require_operator(alice, None)
    limit_changes.set_agreement(
        operator, console_actor.team.pk, AgreementSpec(plan="team", numbers={"max_templates": 40})
    )
    held = envelope(console_actor.team)
    assert (held.value("max_templates"), held.numbers["max_templates"].set_by) == (40, "agreement")
    limit_changes.set_team_limits(console_actor, limits(max_templates=33))
    assert envelope(console_actor.team).value("max_templates") == 33
    with pytest.raises(InvalidInput, match="at most 40, which was agreed for your team"):
        limit_changes.set_team_limits(console_actor, limits(max_templates=41))


def test_a_smaller_plan_caps_what_the_admins_had_set(
    operator: Operator, console_actor: Actor
) -> None:
    limit_changes.set_team_limits(console_actor, limits(max_templates=12))
    limit_changes.set_agreement(operator, console_actor.team.pk, AgreementSpec(plan="pro"))
    held = envelope(console_actor.team)
    assert (held.value("max_templates"), held.numbers["max_templates"].set_by) == (5, "plan")
    entry = AuditEntry.objects.filter(action="plan.set").get()
    assert entry.data["changed"]["plan"] == ["team", "pro"]
    assert entry.team_id == console_actor.team.pk


def test_an_edited_plan_counts_for_every_team_on_it(
    operator: Operator, team: Team, other_team: Team
) -> None:
    plan = Plan.objects.get(pk="team")
    spec = PlanSpec(
        name="Team",
        numbers={**numbers_of(plan), "max_templates": 20},
        sizes=["small"],
        allow_open_network=False,
        custom_egress_allowlist=True,
    )
    limit_changes.edit_plan(operator, "team", spec)
    held = envelope(team)
    assert (held.value("max_templates"), held.sizes) == (20, ("small",))
    assert held.networks == ("off", "restricted")
    assert envelope(other_team).value("max_templates") == 5
    assert [e.team_id for e in AuditEntry.objects.filter(action="plan.edit")] == [team.pk]


def test_a_plan_is_never_left_without_a_number(operator: Operator) -> None:
    plan = Plan.objects.get(pk="pro")
    numbers = numbers_of(plan)
    del numbers["max_volumes"]
    spec = PlanSpec(
        name="Pro",
        numbers=numbers,
        sizes=[],
        allow_open_network=False,
        custom_egress_allowlist=False,
    )
    with pytest.raises(InvalidInput) as caught:
        limit_changes.edit_plan(operator, "pro", spec)
    assert set(caught.value.fields or {}) == {"max_volumes", "sizes"}


def test_new_teams_get_short_names_that_differ(operator: Operator, team: Team) -> None:
    made = [
        limit_changes.create_team(operator, NewTeamSpec(name=name, plan="free"))
        for name in ("Acme", "ACME", "東京")
    ]
    assert [row.slug for row in made] == ["acme-2", "acme-3", "team"]
    with pytest.raises(InvalidInput, match="plan: there are"):
        limit_changes.create_team(operator, NewTeamSpec(name="X", plan="gold"))
