"""What people change about their own account is on record, and so is what was refused of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.test import Client
from django_otp.plugins.otp_totp.models import TOTPDevice

from orkestr_console.accounts.models import AuditEntry, SignedIn, User
from tests.conftest import PASSWORD
from tests.console.test_account import code_of, sign_in

BETTER = "a better passphrase than that"


@pytest.fixture
def here(alice: User) -> Client:
    """A browser alice has signed in with."""
    return sign_in()[0]


def written() -> list[tuple[str, str]]:
    """The actions since the sign-ins, and how each came out."""
    rows = AuditEntry.objects.exclude(action="session.create").order_by("pk")
    return list(rows.values_list("action", "outcome"))


def last() -> AuditEntry:
    entry = AuditEntry.objects.first()
    assert entry is not None
    return entry


def no_entry_has(*secrets: str) -> bool:
    text = json.dumps(list(AuditEntry.objects.values()), default=str)
    return not any(secret in text for secret in secrets)


def test_a_new_name(here: Client, alice: User) -> None:
    here.post("/account/name/", {"name": "Alicia"})
    entry = last()
    assert (entry.team_id, entry.who) == (alice.memberships.get().team_id, alice.email)
    assert (entry.object_kind, entry.object_id, entry.surface) == ("user", str(alice.pk), "console")
    assert entry.data == {"changed": {"name": ["Alice", "Alicia"]}}
    here.post("/account/name/", {"name": "Alicia"})
    here.post("/account/name/", {"name": "x" * 101})
    assert written() == [("account.name", "done"), ("account.name", "denied")]


def test_a_new_password_and_no_word_of_it(here: Client) -> None:
    sign_in(agent="Chrome")
    here.post("/account/password/", {"current": "wrong guess", "password": BETTER})
    here.post("/account/password/", {"current": PASSWORD, "password": "hunter2"})
    here.post("/account/password/", {"current": PASSWORD, "password": BETTER})
    assert written() == [("account.password", how) for how in ("denied", "denied", "done")]
    assert last().data == {"sessions_ended": 1}
    assert no_entry_has("wrong guess", "hunter2", PASSWORD, BETTER)


def test_sessions_that_are_ended(here: Client) -> None:
    for agent in ("Chrome", "Safari", "Opera"):
        sign_in(agent=agent)
    row = SignedIn.objects.get(user_agent="Chrome")
    here.post(f"/account/sessions/{row.pk}/end/")
    here.post(f"/account/sessions/{row.pk}/end/")
    here.post("/account/sessions/end-others/")
    assert last().data == {"sessions_ended": 2}
    here.post("/sign-out/")
    assert written() == [("session.end", how) for how in ("done", "denied", "done", "done")]
    Client().post("/sign-out/")
    assert len(written()) == 4


def test_two_step_sign_in_on_and_off(here: Client, alice: User) -> None:
    here.post("/account/code/begin/")
    device = TOTPDevice.objects.get(user=alice)
    here.post("/account/code/confirm/", {"code": "000000"})
    TOTPDevice.objects.update(throttling_failure_count=0, throttling_failure_timestamp=None)
    code = code_of(device)
    answer: Any = here.post("/account/code/confirm/", {"code": code})
    here.post("/account/code/begin/")
    here.post("/account/code/off/", {"current": "wrong guess"})
    here.post("/account/code/off/", {"current": PASSWORD})
    assert written() == [
        ("second_factor.begin", "done"),
        ("second_factor.on", "denied"),
        ("second_factor.on", "done"),
        ("second_factor.begin", "denied"),
        ("second_factor.off", "denied"),
        ("second_factor.off", "done"),
    ]
    assert no_entry_has("wrong guess", PASSWORD, device.key, *answer.context["codes"])


def test_a_refusal_is_written_with_the_team_one_acts_for(
    here: Client, alice: User, charlie: User
) -> None:
    theirs = charlie.memberships.get().team
    alice.memberships.create(team=theirs)
    here.post("/team/switch/", {"team": theirs.pk})
    here.post("/account/password/", {"current": "wrong guess"})
    assert (last().action, last().team_id) == ("account.password", theirs.pk)
