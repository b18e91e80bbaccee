"""API tokens, the demo team, and what is kept of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings

from orkestr_console.accounts import tokens
from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.models import ApiToken, AuditEntry, Plan, Team, User
from orkestr_console.accounts.services import authenticate_token, mint_token, user_actor
from orkestr_console.core.errors import Forbidden, InsufficientScope, InvalidInput, Unauthenticated

pytestmark = pytest.mark.django_db


def test_a_token_has_the_documented_shape_and_enough_randomness() -> None:
    made = {tokens.new_token()[0] for _ in range(100)}
    assert len(made) == 100
    for text in made:
        prefix, lookup, secret = text.split("_")
        assert (prefix, len(lookup)) == ("ork", 12)
        assert len(secret) >= 40


def test_the_database_holds_nothing_a_token_could_be_made_from(team: Team) -> None:
    row, text = mint_token(team, "CI", [READ])
    stored = json.dumps(list(ApiToken.objects.values()), default=str)
    assert text.rsplit("_", 1)[1] not in stored
    assert row.lookup in text


def test_another_pepper_makes_a_stolen_database_useless(team: Team) -> None:
    _, text = mint_token(team, "CI", [READ])
    with override_settings(TOKEN_PEPPER="another"), pytest.raises(Unauthenticated):
        authenticate_token(text, "rest", None)


@pytest.mark.parametrize("scopes", [[], ["sandboxes:admin"], [READ, "x"]])
def test_a_scope_that_does_not_exist_is_refused(team: Team, scopes: list[str]) -> None:
    with pytest.raises(InvalidInput, match="scope"):
        mint_token(team, "CI", scopes)
    assert not ApiToken.objects.exists()


def test_an_actor_knows_its_scopes(team: Team) -> None:
    reader = Actor(team, None, None, "rest", scopes=frozenset({READ}))
    reader.require(READ)
    with pytest.raises(InsufficientScope):
        reader.require(WRITE)


def test_the_session_chooses_the_team_among_ones_own(
    alice: User, team: Team, other_team: Team
) -> None:
    assert user_actor(alice, other_team.id, None).team == team
    alice.memberships.create(team=other_team)
    assert user_actor(alice, other_team.id, None).team == other_team
    assert user_actor(alice, None, None).team == team


def test_a_person_without_a_team_is_told_whom_to_ask() -> None:
    loner = User.objects.create_user("loner@example.org", "x")
    with pytest.raises(Forbidden, match="administrator"):
        user_actor(loner, None, None)


def test_an_email_address_is_one_whatever_its_case(alice: User) -> None:
    assert User.objects.get_by_natural_key("ALICE@Example.org") == alice


def test_the_plans_are_there() -> None:
    caps = dict(Plan.objects.values_list("code", "max_templates"))
    assert caps == {"free": 0, "pro": 5, "team": 15, "enterprise": 100}


def demo(path: Path) -> dict[str, str]:
    call_command("create_demo", file=path)
    found: dict[str, str] = json.loads(path.read_text())
    return found


def test_the_demo_team_can_sign_in_and_call(tmp_path: Path) -> None:
    found = demo(tmp_path / "console.json")
    assert (tmp_path / "console.json").stat().st_mode & 0o777 == 0o600
    assert User.objects.get(email=found["user"]).check_password(found["password"])
    actor = authenticate_token(found["api_key"], "rest", None)
    actor.require(WRITE)
    assert (actor.team.name, actor.team.plan_id) == (found["team"], "team") == ("Demo", "team")


def test_the_demo_is_kept_while_it_works(tmp_path: Path) -> None:
    path = tmp_path / "console.json"
    first = demo(path)
    path.write_text(json.dumps({**first, "url": "http://127.0.0.1:8000"}))
    assert demo(path) == {**first, "url": "http://127.0.0.1:8000"}
    assert (User.objects.count(), ApiToken.objects.count()) == (1, 1)


def test_the_demo_is_made_anew_where_it_no_longer_works(tmp_path: Path) -> None:
    path = tmp_path / "console.json"
    first = demo(path)
    path.write_text("not json")
    second = demo(path)
    assert second["password"] != first["password"]
    assert authenticate_token(second["api_key"], "rest", None).team.slug == "demo"
    with pytest.raises(Unauthenticated, match="revoked"):
        authenticate_token(first["api_key"], "rest", None)


def test_mint_token_prints_the_token_and_nothing_else(team: Team) -> None:
    output = io.StringIO()
    call_command("mint_token", team="acme", scope=[READ], stdout=output)
    assert authenticate_token(output.getvalue().strip(), "rest", None).scopes == {READ}


def test_mint_token_is_on_record_and_so_is_its_refusal(team: Team) -> None:
    output = io.StringIO()
    call_command("mint_token", team="acme", scope=[READ], name="CI", stdout=output)
    with pytest.raises(CommandError, match="not a scope"):
        call_command("mint_token", team="acme", scope=["x"])
    Team.objects.filter(pk=team.pk).update(plan="free")
    with pytest.raises(CommandError, match="no token was created"):
        call_command("mint_token", team="acme", scope=[READ], plan_check=True)
    done, *refused = AuditEntry.objects.filter(team_id=team.pk, action="token.create").order_by(
        "pk"
    )
    assert (done.outcome, done.who, done.object_name) == ("done", "system", "CI")
    assert done.data["scopes"] == [READ]
    assert output.getvalue().strip() not in str(done.data)
    assert [(e.outcome, e.code) for e in refused] == [
        ("denied", "invalid_request"),
        ("denied", "plan_limit"),
    ]


def test_mint_token_says_which_teams_there_are(team: Team) -> None:
    with pytest.raises(CommandError, match="no team 'acne'; there are: acme"):
        call_command("mint_token", team="acne", scope=[READ])
