"""The account calls of the official command line: one's own tokens, and nothing of others'."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from orkestr_console.accounts import own_tokens
from orkestr_console.accounts.actor import EVERYTHING, READ, WRITE
from orkestr_console.accounts.models import ApiToken, AuditEntry, Membership, Role, Team, User
from orkestr_console.accounts.own_tokens import MAX_LIVE
from orkestr_console.accounts.services import mint_token
from tests.conftest import api_client

TOKENS = "/api/v1/api-tokens"


def client_of(user: User | None, team: Team, *scopes: str, **more: Any) -> tuple[Client, ApiToken]:
    token, text = mint_token(team, "mine", scopes or (READ, WRITE), created_by=user, **more)
    return api_client(text), token


def create(client: Client, **body: Any) -> Any:
    return client.post(TOKENS, {"name": "ci", **body}, content_type="application/json")


def names(client: Client) -> list[str]:
    return [row["name"] for row in client.get(TOKENS).json()["tokens"]]


def test_who_one_is(alice: User, team: Team) -> None:
    client, token = client_of(alice, team)
    told = client.get("/api/auth/me").json()
    assert (told["username"], told["email"]) == ("Alice", "alice@example.org")
    assert (told["plan"], told["is_active"], told["team"]["name"]) == ("team", True, "Acme")
    assert told["created_at"].endswith("Z")
    assert told["token"]["id"] == token.lookup


def test_a_token_of_nobody_says_its_own_name(team: Team) -> None:
    client, _ = client_of(None, team)
    told = client.get("/api/auth/me").json()
    assert (told["username"], told["email"]) == ("mine", None)


def test_a_token_that_is_made_works_and_is_listed(alice: User, team: Team) -> None:
    client, token = client_of(alice, team)
    made = create(client, expires_in_days=3)
    assert made.status_code == 201
    assert made["Cache-Control"] == "no-store"
    row = made.json()
    assert api_client(row["token"]).get("/v1/sandboxes").status_code == 200
    listed = client.get(TOKENS).json()["tokens"]
    assert [one["id"] for one in listed] == [row["id"], token.lookup]
    assert row["token"].split("_")[1] == row["id"]
    assert "token" not in listed[0]
    left = ApiToken.objects.get(lookup=row["id"]).expires_at
    assert left is not None
    assert timedelta(days=2) < left - timezone.now() <= timedelta(days=3)
    entry = AuditEntry.objects.filter(action="token.create").first()
    assert entry is not None
    assert (entry.who, entry.token, entry.data["issuer"]) == (
        "alice@example.org",
        token.prefix,
        token.prefix,
    )


def test_a_token_never_gives_more_than_it_has(alice: User, team: Team) -> None:
    soon = timezone.now() + timedelta(days=5)
    client, token = client_of(
        alice, team, WRITE, expires_at=soon, allowed_templates=["a"], allowed_networks=["off"]
    )
    made = ApiToken.objects.get(lookup=create(client).json()["id"])
    assert (made.scopes, made.expires_at) == (token.scopes, soon)
    assert (made.allowed_templates, made.allowed_networks) == (["a"], ["off"])
    refused = create(client, expires_in_days=6)
    assert refused.status_code == 400
    assert "at most 4 days" in refused.json()["fields"]["expires_in_days"]
    for more in ({"scopes": [EVERYTHING]}, {"allowed_networks": None}, {"expires_in_days": 0}):
        assert create(client, **more).status_code == 400
    reader, _ = client_of(alice, team, READ)
    assert create(reader).json()["code"] == "insufficient_scope"


def test_what_a_token_made_ends_with_it(alice: User, team: Team, console: Client) -> None:
    client, token = client_of(alice, team)
    child = create(client).json()["token"]
    grandchild = create(api_client(child), name="deeper").json()["token"]
    console.post(f"/team/tokens/{token.pk}/revoke/")
    for text in (child, grandchild):
        assert api_client(text).get("/v1/sandboxes").status_code == 401
    assert AuditEntry.objects.filter(action="token.revoke").count() == 3


def test_a_token_that_signs_off_leaves_what_it_made(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team)
    child = create(client).json()["token"]
    assert client.delete("/api/api-tokens/current").status_code == 204
    assert client.delete("/api/api-tokens/current").status_code == 401
    assert api_client(child).get("/v1/sandboxes").status_code == 200


def test_a_person_who_is_no_admin_any_more_makes_no_tokens(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team)
    place = Membership.objects.filter(user=alice, team=team)
    place.update(role=Role.MEMBER)
    assert create(client).status_code == 403
    place.delete()
    assert "admins of Acme" in create(client).json()["detail"]


def test_a_deleted_token_is_out_at_once(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team)
    row = create(client).json()
    assert client.delete(f"{TOKENS}/{row['id']}").status_code == 204
    assert client.delete(f"{TOKENS}/{row['id']}").status_code == 204
    assert api_client(row["token"]).get("/v1/sandboxes").status_code == 401
    assert names(client) == ["mine"]


def test_an_id_may_be_as_short_as_the_command_line_shows_it(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team)
    first, second = (create(client).json()["id"] for _ in range(2))
    ApiToken.objects.filter(lookup=second).update(lookup=first[:8] + "0000")
    assert client.delete(f"{TOKENS}/{first[:7]}").status_code == 404
    assert "Several" in client.delete(f"{TOKENS}/{first[:8]}").json()["detail"]
    assert client.delete(f"{TOKENS}/{first[:8]}0").status_code == 204
    assert client.delete(f"{TOKENS}/________").status_code == 404


def test_a_token_ends_only_those_that_can_do_no_more(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team, WRITE, allowed_networks=["off"])
    _, everything = client_of(alice, team, EVERYTHING)
    _, open_network = client_of(alice, team, READ)
    _, less = client_of(alice, team, READ, allowed_networks=["off"])
    for token in (everything, open_network):
        refused = client.delete(f"{TOKENS}/{token.lookup}")
        assert (refused.status_code, refused.json()["code"]) == (403, "token_restricted")
    assert client.delete(f"{TOKENS}/{less.lookup}").status_code == 204
    reader, own = client_of(alice, team, READ, allowed_networks=["off"])
    assert reader.delete(f"{TOKENS}/{own.lookup}").status_code == 204


def test_the_tokens_of_others_are_unknown(alice: User, bob: User, team: Team) -> None:
    client, _ = client_of(alice, team, EVERYTHING)
    _, bobs = client_of(bob, team)
    _, nobodys = client_of(None, team)
    for token in (bobs, nobodys):
        assert client.delete(f"{TOKENS}/{token.lookup}").status_code == 404
    assert names(client) == ["mine"]


def test_there_is_a_most_of_tokens(alice: User, team: Team) -> None:
    client, _ = client_of(alice, team)
    for _ in range(MAX_LIVE - 1):
        mint_token(team, "more", [READ], created_by=alice)
    refused = create(client)
    assert refused.status_code == 409
    assert "revoke" in refused.json()["detail"]


def test_tokens_that_are_nobodys_make_no_more_than_that_by_others_that_they_made(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tokens, "MAX_LIVE", 4)
    client, _ = client_of(None, team)
    for _ in range(2):
        assert create(client).status_code == 201
        made = create(client)
        assert made.status_code == 201
        client = api_client(made.json()["token"])
    refused = create(client)
    assert refused.status_code == 409
    assert refused.json()["detail"].startswith("The tokens of Acme that are nobody's have made 4")
    # One less makes room.
    ApiToken.objects.filter(origin__issuer__isnull=False).first().delete()  # type: ignore[union-attr]
    assert create(client_of(None, team)[0]).status_code == 201


@pytest.mark.parametrize("address", ["/api/", "/api", "/api/v1/projects", "/api/auth/oauth/x"])
@pytest.mark.parametrize("method", ["get", "post", "delete", "patch"])
def test_everything_else_is_404_in_json(api: Client, address: str, method: str) -> None:
    for client in (api, api_client(None)):
        told = getattr(client, method)(address)
        assert (told.status_code, told.json()["code"]) == (404, "not_found")
        assert told["X-Request-Id"]


def test_another_method_is_405_in_json(api: Client) -> None:
    told = api.get("/api/auth/device/start")
    assert (told.status_code, told.json()["code"]) == (405, "method_not_allowed")
