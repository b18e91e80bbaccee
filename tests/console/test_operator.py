"""The operator's pages: all teams, plans and agreements, and nobody else in there."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.limits import KINDS, envelope
from orkestr_console.accounts.models import AuditEntry, Plan, Team, User
from tests.console.markup import tight
from tests.fakes.host import FakeHost

BLANK = dict.fromkeys(KINDS, "")


def text(answer: Any) -> str:
    return tight(answer)


@pytest.fixture
def operator(team: Team, other_team: Team) -> Client:
    client = Client()
    client.force_login(User.objects.create_superuser("root@example.org", "x", name="Root"))
    return client


@pytest.mark.parametrize("address", ["", "teams/new/", "teams/{team}/", "plans/pro/"])
def test_to_anybody_else_they_are_not_there(console: Client, team: Team, address: str) -> None:
    path = f"/operator/{address.format(team=team.pk)}"
    assert console.get(path).status_code == 404
    assert console.post(path, {"plan": "enterprise", **BLANK}).status_code in {404, 405}
    team.refresh_from_db()
    assert team.plan_id == "team"


@pytest.mark.parametrize("address", ["teams/new/", "teams/{team}/", "plans/pro/"])
def test_a_write_of_anybody_else_is_on_record(console: Client, team: Team, address: str) -> None:
    path = f"/operator/{address.format(team=team.pk)}"
    console.get(path)
    assert not AuditEntry.objects.exists()
    console.post(path, {"plan": "enterprise", **BLANK})
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.outcome) == ("operator.call", "denied")
    assert (entry.team_id, entry.who) == (team.pk, "alice@example.org")
    assert entry.object_id == f"POST {path}"


@pytest.mark.parametrize(
    ("path", "typed", "action"),
    [
        ("plans/pro/", {"name": "Pro", **BLANK, "sizes": ["small"]}, "plan.edit"),
        ("plans/pro/", {"name": "", **BLANK}, "plan.edit"),
        ("teams/new/", {"name": "X", "plan": "gold"}, "team.create"),
        ("teams/new/", {"name": "", "plan": "pro"}, "team.create"),
        ("teams/new/", {"name": "X", "plan": "pro", "email": "no address"}, "team.create"),
    ],
)
def test_what_an_operator_is_refused_is_on_record(
    operator: Client, path: str, typed: dict[str, Any], action: str
) -> None:
    assert operator.post(f"/operator/{path}", typed).status_code == 400
    entry = AuditEntry.objects.get()
    assert (entry.action, entry.outcome) == (action, "denied")
    assert (entry.who, Team.objects.get(pk=entry.team_id).name) == ("root@example.org", "Acme")
    assert Team.objects.count() == 2


def test_all_teams_are_listed_and_found(operator: Client) -> None:
    page = text(operator.get("/operator/"))
    assert "Acme" in page and "Globex" in page
    page = text(operator.get("/operator/?q=glob"))
    assert "Globex</a>" in page and "Acme</a>" not in page


def test_what_the_machine_is_promised_is_shown_if_it_is_known(
    operator: Client, host: FakeHost
) -> None:
    shown = text(operator.get("/operator/"))
    assert "7 of at most 250 sandboxes and builds" in shown
    assert "7168 of 262144 MiB of memory and 7.5 of 512 processors" in shown
    host.down = True
    assert "sandboxes and builds, which" not in text(operator.get("/operator/"))


def test_a_plan_and_an_agreement_count_at_once(operator: Client, team: Team) -> None:
    typed = {**BLANK, "plan": "enterprise", "max_templates": "123", "note": "until spring"}
    answer = operator.post(f"/operator/teams/{team.pk}/", typed)
    assert answer.status_code == 302
    held = envelope(team)
    assert (held.plan.pk, held.value("max_templates")) == ("enterprise", 123)
    page = text(operator.get(f"/operator/teams/{team.pk}/"))
    assert 'value="123"' in page and "until spring" in page


def test_what_is_wrong_is_said_and_nothing_is_lost(operator: Client, team: Team) -> None:
    typed = {**BLANK, "plan": "gold", "max_templates": "x", "note": "until spring"}
    answer = operator.post(f"/operator/teams/{team.pk}/", typed)
    assert answer.status_code == 400
    assert "Templates must be a whole number" in text(answer)
    assert "until spring" in text(answer)


def test_a_plan_is_edited(operator: Client, team: Team) -> None:
    plan = Plan.objects.get(pk="team")
    numbers = {name: getattr(plan, name) for name in KINDS}
    typed = {"name": "Team", **numbers, "max_templates": 30, "sizes": ["small", "large"]}
    assert operator.post("/operator/plans/team/", typed)["Location"] == "/operator/"
    held = envelope(team)
    assert (held.value("max_templates"), held.sizes) == (30, ("small", "large"))
    assert "open" not in held.networks


def test_a_plan_without_a_number_is_refused(operator: Client) -> None:
    answer = operator.post("/operator/plans/pro/", {"name": "Pro", **BLANK, "sizes": ["small"]})
    assert answer.status_code == 400
    assert Plan.objects.get(pk="pro").max_templates == 5


def test_an_unknown_plan_or_team_is_not_found(operator: Client) -> None:
    for path in ("plans/gold/", "teams/team_nobody/", "teams/%00/"):
        assert operator.get(f"/operator/{path}").status_code in {400, 404}
