"""The page that approves or denies a program's login."""

from __future__ import annotations

import pytest
from django.test import Client

from orkestr_console.accounts import device_login
from orkestr_console.accounts.device_login import DeviceStartSpec, StartedLogin
from orkestr_console.accounts.models import DeviceLogin, Team, User

PAGE = "/device/"


@pytest.fixture
def login(db: None) -> StartedLogin:
    spec = DeviceStartSpec(client_name="<b>orkestr</b> CLI on box")
    return device_login.start(spec, "192.0.2.7")


def text_of(answer: object) -> str:
    return " ".join(str(answer.content.decode()).split())  # type: ignore[attr-defined]


def test_a_link_shows_the_login_and_answers_nothing(console: Client, login: StartedLogin) -> None:
    shown = text_of(console.get(PAGE, {"code": login.user_code, "answer": "approve"}))
    assert login.user_code in shown
    assert "&lt;b&gt;orkestr&lt;/b&gt; CLI on box" in shown
    assert "192.0.2.7" in shown
    assert "If somebody sent you this link or code, deny it" in shown
    assert DeviceLogin.objects.get().answered_at is None


def test_a_code_may_be_typed_any_way(console: Client, login: StartedLogin) -> None:
    typed = login.user_code.lower().replace("-", " ")
    assert login.user_code in text_of(console.post(PAGE, {"code": typed}))
    assert "Code" in text_of(console.get(PAGE))


def test_a_wrong_code_says_so_at_the_field(console: Client, login: StartedLogin) -> None:
    for answer in (console.get(PAGE, {"code": "nope"}), console.post(PAGE, {"code": ""})):
        assert answer.status_code == 400
        assert "This code belongs to no login request that is open" in text_of(answer)


def test_approving_takes_what_was_chosen(console: Client, login: StartedLogin, alice: User) -> None:
    form = {"code": login.user_code, "answer": "approve", "access": "read", "days": ""}
    assert "Approved" in text_of(console.post(PAGE, form))
    row = DeviceLogin.objects.get()
    assert (row.user, row.scopes, row.days) == (alice, ["sandboxes:read"], None)
    again = console.post(PAGE, form)
    assert again.status_code == 409
    assert "already answered" in text_of(again)


def test_a_program_gets_no_access_to_another_team_than_the_page_said(
    console: Client, login: StartedLogin, other_team: Team, team: Team
) -> None:
    shown = text_of(console.get(PAGE, {"code": login.user_code}))
    assert f'name="team" value="{team.pk}"' in shown
    form = {"code": login.user_code, "answer": "approve", "access": "read", "days": ""}
    answer = console.post(PAGE, {**form, "team": other_team.pk})
    assert answer.status_code == 400
    assert "You have switched teams" in text_of(answer)
    assert DeviceLogin.objects.get().answered_at is None
    assert "Approved" in text_of(console.post(PAGE, {**form, "team": team.pk}))


@pytest.mark.parametrize("wrong", [{"access": "all"}, {"days": "0"}, {"days": "x"}])
def test_a_wrong_choice_keeps_the_login(
    console: Client, login: StartedLogin, wrong: dict[str, str]
) -> None:
    answer = console.post(PAGE, {"code": login.user_code, "answer": "approve", **wrong})
    assert answer.status_code == 400
    assert login.user_code in text_of(answer)
    assert DeviceLogin.objects.get().answered_at is None


def test_a_member_sees_whom_to_ask(bob: User, alice: User, login: StartedLogin) -> None:
    client = Client()
    client.force_login(bob)
    shown = text_of(client.get(PAGE, {"code": login.user_code}))
    assert "Only admins can approve this" in shown
    assert "Alice" in shown
    assert 'value="approve"' not in shown


def test_another_site_cannot_answer(alice: User, login: StartedLogin) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    refused = client.post(PAGE, {"code": login.user_code, "answer": "approve"})
    assert refused.status_code == 403
    assert DeviceLogin.objects.get().answered_at is None


def test_who_is_not_signed_in_comes_back_with_the_code(login: StartedLogin) -> None:
    answer = Client().get(PAGE, {"code": login.user_code})
    assert answer.status_code == 302
    assert answer["Location"] == f"/sign-in/?next=/device/%3Fcode%3D{login.user_code}"
