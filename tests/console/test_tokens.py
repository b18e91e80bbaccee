"""The page of API tokens: made once, shown once, restricted, revoked at once."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.models import ApiToken, AuditEntry, Team, User
from tests.conftest import MakeKey, api_client
from tests.console.markup import tight

ADDRESS = "/team/tokens/"
GOOD = {"name": "ci", "scopes": ["sandboxes:read", "sandboxes:write"], "days": "30"}


def text(answer: Any) -> str:
    return tight(answer)


def shown_token(answer: Any) -> str:
    found = re.search(r'<code id="new-token">(ork_\w+)</code>', text(answer))
    assert found
    return found[1]


def test_a_token_is_shown_once_and_works(console: Client, team: Team) -> None:
    token = shown_token(console.post(ADDRESS, GOOD))
    assert api_client(token).get("/v1/templates").status_code == 200
    page = text(console.get(ADDRESS))
    assert token not in page
    row = ApiToken.objects.get()
    assert row.prefix in page
    assert token not in str(AuditEntry.objects.get(action="token.create").data)


def test_its_answer_is_kept_by_no_cache(console: Client) -> None:
    assert "no-store" in console.post(ADDRESS, GOOD)["Cache-Control"]


def test_a_revoked_token_is_refused_by_its_next_call(console: Client) -> None:
    token = shown_token(console.post(ADDRESS, GOOD))
    row = ApiToken.objects.get()
    assert console.post(f"{ADDRESS}{row.pk}/revoke/")["Location"] == ADDRESS
    assert api_client(token).get("/v1/templates").status_code == 401
    assert "revoked" in text(console.get(ADDRESS))


def test_a_restricted_token_uses_only_what_it_is_for(console: Client) -> None:
    chosen = {"restrict_networks": "on", "networks": ["off"]}
    bases = {"restrict_templates": "on", "templates": ["debian-12"]}
    token = shown_token(console.post(ADDRESS, {**GOOD, **chosen, **bases}))

    def boot(**body: str) -> Any:
        return api_client(token).post("/v1/sandboxes", body, content_type="application/json")

    assert boot(template="debian-12").status_code == 201
    other = boot(template="python-3.12")
    assert (other.status_code, other.json()["code"]) == (403, "token_restricted")
    network = boot(template="debian-12", network="restricted")
    assert (network.status_code, network.json()["code"]) == (403, "network_policy_blocked")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": " "}, "The name must have at least 1 characters"),
        ({"name": "x" * 101}, "at most 100 characters"),
        ({"scopes": []}, "Scopes must have at least 1 entries"),
        ({"days": "0"}, "must be at least 1"),
        ({"days": "soon"}, "must be a whole number"),
        ({"restrict_networks": "on"}, "Networks must have at least one chosen"),
        (
            {"restrict_templates": "on", "templates": ["tmpl_of_others"]},
            "includes one that no longer exists",
        ),
    ],
)
def test_what_is_wrong_is_said_and_no_token_is_made(
    console: Client, change: dict[str, Any], sentence: str
) -> None:
    answer = console.post(ADDRESS, {**GOOD, **change})
    assert answer.status_code == 400
    assert sentence in text(answer)
    assert not ApiToken.objects.exists()


def test_a_member_is_told_whom_to_ask(bob: User, alice: User) -> None:
    client = Client()
    client.force_login(bob)
    answer = client.get(ADDRESS)
    assert answer.status_code == 403
    assert "Ask Alice (alice@example.org)" in text(answer)
    assert client.post(ADDRESS, GOOD).status_code == 403
    assert not ApiToken.objects.exists()


def test_another_teams_token_is_not_there(
    console: Client, other_team: Team, make_key: MakeKey
) -> None:
    make_key(other_team)
    row = ApiToken.objects.get()
    assert console.post(f"{ADDRESS}{row.pk}/revoke/").status_code == 404
    assert ApiToken.objects.get().revoked_at is None
    assert row.prefix not in text(console.get(ADDRESS))
