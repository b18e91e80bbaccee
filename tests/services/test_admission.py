"""The rate of an admission, against the one rule of accounts.limits; and calls at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
from django.db import connection

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
