"""Tokens and logins that two callers are at in the same moment, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from django.db import connections

from orkestr_console.accounts import api_tokens, device_login, own_tokens
from orkestr_console.accounts.actor import WRITE, Actor
from orkestr_console.accounts.device_login import (
    DeviceApprovalSpec,
    DevicePollSpec,
    DeviceStartSpec,
    SignedIn,
)
from orkestr_console.accounts.models import ApiToken, Team, User
from orkestr_console.accounts.own_tokens import OwnTokenSpec
from orkestr_console.accounts.services import authenticate_token, mint_token

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE = 30


def closing[R](call: Callable[[], R]) -> R:
    """Run a call, and leave no connection of its thread behind."""
    try:
        return call()
    finally:
        connections.close_all()


@pytest.mark.usefixtures("plans")
def test_a_token_that_is_made_as_its_maker_is_revoked_is_revoked_too(
    console_actor: Actor, team: Team, alice: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, text = mint_token(team, "issuer", [WRITE], created_by=alice)
    actor = authenticate_token(text, "rest", None)
    making, go_on = threading.Event(), threading.Event()

    def slowly(*args: Any, **kwargs: Any) -> tuple[ApiToken, str]:
        making.set()
        assert go_on.wait(PATIENCE)
        return mint_token(*args, **kwargs)

    monkeypatch.setattr(own_tokens, "mint_token", slowly)
    with ThreadPoolExecutor(2) as pool:
        made: Future[tuple[ApiToken, str]] = pool.submit(
            closing, lambda: own_tokens.create_own(actor, OwnTokenSpec(name="child"))
        )
        assert making.wait(PATIENCE)
        revoked = pool.submit(closing, lambda: api_tokens.revoke(console_actor, issuer.pk))
        # It waits for the other, and must not get past it.
        with pytest.raises(TimeoutError):
            revoked.result(0.3)
        go_on.set()
        child = made.result(PATIENCE)[0]
        revoked.result(PATIENCE)
    assert ApiToken.objects.get(pk=child.pk).revoked_at is not None


@pytest.mark.usefixtures("plans")
def test_an_approved_login_is_handed_to_one_of_many_that_ask(console_actor: Actor) -> None:
    login = device_login.start(DeviceStartSpec(client_name="a program"), "192.0.2.1")
    spec = DeviceApprovalSpec(code=login.user_code, access="write")
    device_login.approve(console_actor, spec)
    callers = 6
    gate = threading.Barrier(callers)

    def ask() -> Any:
        gate.wait(PATIENCE)
        return device_login.poll(DevicePollSpec(device_code=login.device_code), "192.0.2.1")

    with ThreadPoolExecutor(callers) as pool:
        asked = [pool.submit(closing, ask) for _ in range(callers)]
        answers = [one.result(PATIENCE) for one in asked]
    assert sum(isinstance(one, SignedIn) for one in answers) == 1
    assert [one for one in answers if not isinstance(one, SignedIn)] == ["expired_token"] * 5
    assert ApiToken.objects.count() == 1
