"""Signing a program in with a browser (RFC 8628): what is kept, who answers, and how often."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from orkestr_console.accounts import device_login
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.device_login import (
    ALPHABET,
    MAX_OPEN_OF_SOURCE,
    MAX_WRONG,
    DeviceApprovalSpec,
    DevicePollSpec,
    DeviceStartSpec,
    SignedIn,
    StartedLogin,
)
from orkestr_console.accounts.models import (
    ApiToken,
    AuditEntry,
    DeviceLogin,
    Membership,
    Role,
    Team,
    User,
)
from orkestr_console.accounts.services import authenticate_token, user_actor
from orkestr_console.core.errors import (
    Conflict,
    DomainError,
    Forbidden,
    InvalidInput,
    RateLimited,
)

pytestmark = pytest.mark.django_db


def start(address: str = "192.0.2.7") -> StartedLogin:
    return device_login.start(DeviceStartSpec(client_name="orkestr CLI on box"), address)


def poll(login: StartedLogin) -> Any:
    return device_login.poll(DevicePollSpec(device_code=login.device_code), "192.0.2.7")


def approve(actor: Actor, login: StartedLogin, access: Any = "write", days: Any = 90) -> None:
    spec = DeviceApprovalSpec(code=login.user_code, access=access, days=days)
    device_login.approve(actor, spec)


def test_a_code_is_easy_to_type_and_hard_to_guess() -> None:
    codes = {start(f"192.0.2.{number}").user_code for number in range(20)}
    assert len(codes) == 20
    assert all(re.fullmatch(rf"[{ALPHABET}]{{4}}-[{ALPHABET}]{{4}}", code) for code in codes)
    assert len(ALPHABET) ** 8 > 2**34
    assert not set(ALPHABET) & set("AEIOUY01")
    assert device_login.normalized(" bcdf ghjk") == "BCDF-GHJK"


def test_the_database_holds_neither_code() -> None:
    login = start()
    stored = json.dumps(list(DeviceLogin.objects.values()), default=str)
    assert login.device_code not in stored
    assert login.user_code not in stored


def test_an_approved_login_is_a_token_of_what_was_chosen(console_actor: Actor, team: Team) -> None:
    login = start()
    assert poll(login) == "authorization_pending"
    approve(console_actor, login)
    result = poll(login)
    assert isinstance(result, SignedIn)
    actor = authenticate_token(result.text, "rest", None)
    assert (actor.team, actor.user) == (team, console_actor.user)
    assert actor.scopes == {READ, WRITE}
    assert result.token.name == "orkestr CLI on box"
    left = result.token.expires_at
    assert left is not None
    assert timedelta(days=89) < left - timezone.now() <= timedelta(days=90)
    told = AuditEntry.objects.filter(action__in=["device.approve", "token.create"])
    assert sorted(told.values_list("action", "who")) == [
        ("device.approve", "alice@example.org"),
        ("token.create", "alice@example.org"),
    ]


def test_it_is_handed_out_once(console_actor: Actor) -> None:
    login = start()
    approve(console_actor, login)
    assert isinstance(poll(login), SignedIn)
    assert poll(login) == "expired_token"
    assert ApiToken.objects.count() == 1


def test_a_denied_login_gets_nothing(console_actor: Actor) -> None:
    login = start()
    device_login.deny(console_actor, login.user_code)
    assert poll(login) == "access_denied"
    with pytest.raises(Conflict):
        approve(console_actor, login)
    assert not ApiToken.objects.exists()


def test_whoever_polls_too_often_slows_down() -> None:
    login = start()
    assert [poll(login) for _ in range(3)] == ["authorization_pending", "slow_down", "slow_down"]
    row = DeviceLogin.objects.get()
    assert row.interval == device_login.INTERVAL + 2 * device_login.SLOWER_BY
    DeviceLogin.objects.update(polled_at=timezone.now() - timedelta(seconds=row.interval))
    assert poll(login) == "authorization_pending"


def test_an_expired_or_unknown_login_is_the_same(console_actor: Actor) -> None:
    login = start()
    DeviceLogin.objects.update(expires_at=timezone.now())
    unknown = StartedLogin("x" * 43, "BCDF-GHJK")
    assert poll(login) == poll(unknown) == "expired_token"
    said = []
    for one in (login, unknown):
        with pytest.raises(InvalidInput) as caught:
            approve(console_actor, one)
        said.append(caught.value.to_wire())
    assert said[0] == said[1]
    start()
    assert DeviceLogin.objects.count() == 1, "expired ones are not kept"


def test_a_member_may_deny_but_not_approve(bob: User) -> None:
    actor = user_actor(bob, None, "192.0.2.1")
    login = start()
    with pytest.raises(Forbidden):
        approve(actor, login)
    assert poll(login) == "authorization_pending"
    device_login.deny(actor, login.user_code)
    assert AuditEntry.objects.filter(action="device.approve", outcome="denied").exists()


def test_who_may_no_longer_create_tokens_has_approved_none(
    console_actor: Actor, alice: User
) -> None:
    logins = [start() for _ in range(3)]
    for login in logins:
        approve(console_actor, login)
    User.objects.filter(pk=alice.pk).update(is_active=False)
    assert poll(logins[0]) == "access_denied"
    User.objects.filter(pk=alice.pk).update(is_active=True)
    Membership.objects.filter(user=alice).update(role=Role.MEMBER)
    assert poll(logins[1]) == "access_denied"
    Membership.objects.filter(user=alice).delete()
    assert poll(logins[2]) == "access_denied"
    assert not ApiToken.objects.exists()


def test_an_approval_is_for_the_team_it_was_given_for(
    console_actor: Actor, alice: User, other_team: Team
) -> None:
    login = start()
    approve(console_actor, login)
    Membership.objects.filter(user=alice).update(team=other_team)
    assert poll(login) == "access_denied"


def test_wrong_codes_are_counted(console_actor: Actor, bob: User) -> None:
    login = start()

    def code_of(number: int) -> DomainError:
        with pytest.raises(DomainError) as caught:
            device_login.find(console_actor, f"BBBB-BBB{ALPHABET[number]}")
        return caught.value

    said = [type(code_of(number)) for number in range(MAX_WRONG + 2)]
    assert said == [InvalidInput] * MAX_WRONG + [RateLimited] * 2
    with pytest.raises(RateLimited):
        approve(console_actor, login)
    # Who else answers is not kept from it.
    device_login.deny(user_actor(bob, None, None), login.user_code)


def test_one_place_starts_only_so_many() -> None:
    for number in range(MAX_OPEN_OF_SOURCE):
        start(f"2001:db8::{number:x}")
    with pytest.raises(RateLimited) as caught:
        start("2001:db8::ffff")
    assert caught.value.retry_after
    start("2001:db8:0:1::1")
    start("192.0.2.1")


def test_past_the_most_of_all_those_who_have_most_lose_their_oldest(
    console_actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_login, "MAX_OPEN", 5)
    mine, approved = start("192.0.2.1"), start("192.0.2.9")
    approve(console_actor, approved)
    flood = [start("192.0.2.9") for _ in range(9)]
    assert DeviceLogin.objects.count() == 5
    assert [poll(each) for each in flood[:6]] == ["expired_token"] * 6
    assert {poll(each) for each in (mine, *flood[6:])} == {"authorization_pending"}
    assert isinstance(poll(approved), SignedIn)


def test_past_the_most_of_all_from_everywhere_the_oldest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_login, "MAX_OPEN", 3)
    first, *others = [start(f"192.0.2.{number}") for number in range(4)]
    assert poll(first) == "expired_token"
    assert {poll(each) for each in others} == {"authorization_pending"}
