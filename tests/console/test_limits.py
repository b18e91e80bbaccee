"""The page of limits: what a member sees, what an admin sets, and that nothing typed is lost."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.limits import KINDS, envelope
from orkestr_console.accounts.models import Team, TeamLimits, User
from templates_app.models import Template
from tests.console.markup import tight
from tests.fakes.host import FakeHost

ADDRESS = "/team/limits/"
NOTHING = {
    **dict.fromkeys(KINDS, ""),
    "share_max_templates": "",
    "share_max_concurrent_sandboxes": "",
    "sizes": ["small", "medium", "large"],
    "networks": ["off", "restricted", "open"],
    "bases": ["debian-12", "python-3.12", "python-3.12-bare", "node-22"],
}


def text(answer: Any) -> str:
    return tight(answer)


@pytest.fixture
def member_console(bob: User) -> Client:
    client = Client()
    client.force_login(bob)
    return client


def test_every_limit_is_shown_with_its_use(console: Client, building: Template) -> None:
    page = text(console.get(ADDRESS))
    for kind in KINDS.values():
        assert kind.label in page
    assert "1 of 15 used" in page
    assert "Plan: 15" in page


def test_an_admin_lowers_a_limit_and_it_counts(console: Client, team: Team) -> None:
    answer = console.post(ADDRESS, {**NOTHING, "max_templates": "3"})
    assert answer["Location"] == ADDRESS
    assert envelope(team).value("max_templates") == 3
    page = text(console.get(ADDRESS))
    assert "0 of 3 used" in page
    assert 'value="3"' in page


def test_everything_ticked_restricts_nothing(console: Client, team: Team) -> None:
    console.post(ADDRESS, NOTHING)
    own = TeamLimits.objects.get(team=team)
    assert (own.allowed_sizes, own.allowed_networks) == (None, None)


def test_what_is_left_out_is_restricted(console: Client, team: Team) -> None:
    console.post(ADDRESS, {**NOTHING, "networks": ["off"], "bases": ["debian-12"]})
    held = envelope(team)
    assert held.networks == ("off",)
    assert held.bases == ("debian-12",)


@pytest.mark.parametrize(
    ("field", "typed", "sentence"),
    [
        ("max_templates", "16", "Templates can be at most 15, which the Team plan has"),
        ("max_templates", "-1", "must be at least 0"),
        ("max_templates", "many", "must be a whole number"),
        ("max_templates", "1.5", "must be a whole number"),
        ("max_templates", "9" * 30, "must be at most"),
        ("share_max_templates", "x", "Templates per person must be a whole number"),
        ("networks", [], "Networks must keep at least one"),
        ("sizes", ["huge"], "offers small, medium, large"),
    ],
)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_lost(
    console: Client, team: Team, field: str, typed: Any, sentence: str
) -> None:
    answer = console.post(ADDRESS, {**NOTHING, "max_snapshots": "1", field: typed})
    assert answer.status_code == 400
    page = text(answer)
    assert sentence in page
    assert f'id="{field}-error"' in page
    assert 'name="max_snapshots"' in page and 'value="1"' in page
    assert not TeamLimits.objects.filter(team=team).exists()


def test_a_member_sees_them_and_whom_to_ask(member_console: Client, alice: User) -> None:
    page = text(member_console.get(ADDRESS))
    assert "Ask Alice (alice@example.org)" in page
    assert "Save limits" not in page
    answer = member_console.post(ADDRESS, {**NOTHING, "max_templates": "1"})
    assert answer.status_code == 403
    assert "Only an admin of the team can do this" in text(answer)


def test_without_the_host_the_bases_stay_as_they_are(
    console: Client, team: Team, host: FakeHost
) -> None:
    console.post(ADDRESS, {**NOTHING, "bases": ["debian-12"]})
    host.down = True
    console.post(ADDRESS, {**NOTHING, "bases": []})
    assert envelope(team).bases == ("debian-12",)
