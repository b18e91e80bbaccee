"""The rate of an admission, against the one rule of accounts.limits; and calls at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from orkestr_console.accounts import admission
from orkestr_console.accounts.actor import Subject
from orkestr_console.accounts.admission import admit
from orkestr_console.accounts.limits import build_envelope
from orkestr_console.accounts.models import Agreement, ApiToken, Plan, Team, TeamLimits
from tests.conftest import MakeKey


def test_its_rate_is_the_one_of_the_limits(team: Team, make_key: MakeKey) -> None:
    make_key(team)
    token = ApiToken.objects.get()
    # Without a row; with one that lacks this number; and with the number.
    numbers: list[dict[str, int | None] | None] = [
        None,
        *({"api_requests_per_minute": number} for number in (None, 0, 5, 700)),
    ]
    for planned, agreed, own in product((0, 5, 600), numbers, numbers):
        Plan.objects.filter(pk=team.plan_id).update(api_requests_per_minute=planned)
        for model, number in ((Agreement, agreed), (TeamLimits, own)):
            model.objects.filter(team=team).delete()
            if number is not None:
                model.objects.create(team=team, **number)
        found = admit(token.lookup, token.digest)
        assert found is not None
        fresh = Team.objects.get(pk=team.pk)
        expected = build_envelope(fresh).value("api_requests_per_minute")
        # Also from the rows that came with it.
        with_it = build_envelope(found.token.team).value("api_requests_per_minute")
        assert (found.per_minute, with_it) == (expected, expected), (planned, agreed, own)


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_no_more_are_counted_at_once_than_the_bucket_holds(team: Team, make_key: MakeKey) -> None:
    make_key(team)
    # A call each 20 s, so that the test does not wait for another.
    TeamLimits.objects.create(team=team, api_requests_per_minute=3)
    token = ApiToken.objects.get()

    def call(_: int) -> bool:
        try:
            found = admit(token.lookup, token.digest)
            return found is not None and found.counted
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(call, range(40))) == 3


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("plans")
def test_what_is_kept_of_a_token_is_never_out_of_date(team: Team, make_key: MakeKey) -> None:
    """However it was changed, and without anybody being told."""
    make_key(team)
    token = ApiToken.objects.get()

    def allowed() -> tuple[bool, int, int]:
        found = admit(token.lookup, token.digest)
        assert found is not None
        limits = build_envelope(found.token.team)
        return found.valid, limits.value("max_templates"), len(limits.sizes)

    def statements() -> int:
        with CaptureQueriesContext(connection) as captured:
            allowed()
        return len(captured)

    assert allowed()[0]
    assert (statements(), statements()) == (1, 1)
    Plan.objects.filter(pk=team.plan_id).update(max_templates=7, allowed_sizes=["small"])
    assert allowed() == (True, 7, 1)
    TeamLimits.objects.create(team=team, max_templates=3)
    assert allowed() == (True, 3, 1)
    TeamLimits.objects.filter(team=team).delete()
    assert allowed() == (True, 7, 1)
    assert statements() == 1
    ApiToken.objects.update(revoked_at=timezone.now())
    assert allowed()[0] is False
    ApiToken.objects.all().delete()
    assert admit(token.lookup, token.digest) is None


def test_the_row_of_another_team_does_not_come_with_it(
    team: Team, other_team: Team, make_key: MakeKey
) -> None:
    make_key(team)
    token = ApiToken.objects.get()
    for owner, comes in ((team, True), (other_team, False)):
        row = ApiToken.objects.create(team=owner, name="a row", lookup=owner.slug[:16], digest="")
        for digest, valid in ((token.digest, True), ("0" * 64, False)):
            subject = Subject(ApiToken, row.pk)
            admit(token.lookup, digest, subject)
            assert (subject.row == row) is (comes and valid)


def test_only_so_many_are_kept(
    team: Team, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MOST_KEPT", 3)
    for _ in range(10):
        make_key(team)
    for token in ApiToken.objects.all():
        admit(token.lookup, token.digest)
        assert len(admission._kept._kept) <= 3
