"""How fast a token may call: a bucket per token that the clock fills."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.test import Client

from orkestr_console.accounts import limit_changes
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.limit_changes import LimitsSpec
from orkestr_console.accounts.models import ApiToken, RateBucket, Team
from tests.conftest import MakeKey, api_client


@pytest.fixture
def slow(console_actor: Actor) -> None:
    """Acme allows its tokens six calls a minute."""
    limit_changes.set_team_limits(console_actor, LimitsSpec(numbers={"api_requests_per_minute": 6}))


def calls(client: Client, number: int) -> list[int]:
    return [client.get("/v1/templates").status_code for _ in range(number)]


@pytest.mark.usefixtures("slow")
def test_past_its_rate_a_token_is_told_when_to_come_back(api: Client) -> None:
    assert calls(api, 6) == [200] * 6
    refused = api.get("/v1/templates")
    assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
    assert 1 <= int(refused["Retry-After"]) <= 10
    assert "6" in refused.json()["detail"]


@pytest.mark.usefixtures("slow")
def test_the_clock_fills_the_bucket_again(api: Client) -> None:
    calls(api, 6)
    bucket = RateBucket.objects.get()
    bucket.at -= timedelta(seconds=10)
    bucket.save()
    assert calls(api, 2) == [200, 429]


@pytest.mark.usefixtures("slow")
def test_one_tokens_haste_is_not_anothers(api: Client, team: Team, make_key: MakeKey) -> None:
    calls(api, 7)
    assert calls(api_client(make_key(team)), 1) == [200]


@pytest.mark.usefixtures("slow")
def test_raising_the_rate_counts_at_once(api: Client, console_actor: Actor) -> None:
    assert calls(api, 7)[-1] == 429
    limit_changes.set_team_limits(console_actor, LimitsSpec())
    bucket = RateBucket.objects.get()
    bucket.at -= timedelta(seconds=1)
    bucket.save()
    assert calls(api, 2) == [200, 200]


def test_a_token_is_minted_only_where_the_plan_has_templates(
    team: Team, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("mint_token", "--team=acme", "--scope=sandboxes:read", "--plan-check")
    call_command(*asked, "--network=off", "--template=debian-12")
    printed = capsys.readouterr().out
    assert printed.strip().startswith("ork_")
    assert len(printed.split()) == 1
    token = ApiToken.objects.get()
    assert (token.allowed_networks, token.allowed_templates) == (["off"], ["debian-12"])
    Team.objects.filter(pk=team.pk).update(plan="free")
    with pytest.raises(CommandError, match="has no custom templates: no token was created"):
        call_command(*asked)
    assert capsys.readouterr().out == ""
    assert ApiToken.objects.count() == 1
