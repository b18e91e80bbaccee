"""What the agent makes of the parameters of a request."""

from __future__ import annotations

import pytest
from starlette.requests import Request

from hostruntime.agent.requests import query_number
from hostruntime.errors import InvalidRequest


def request(query: str) -> Request:
    return Request({"type": "http", "query_string": query.encode(), "headers": []})


@pytest.mark.parametrize("text", ["inf", "-inf", "nan", "1e999", "x", ""])
def test_what_is_no_finite_number_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="offset must be a number"):
        query_number(request(f"offset={text}"), "offset", 0)


def test_a_number_is_taken_and_without_one_the_default() -> None:
    assert query_number(request("offset=1.5"), "offset", 0) == 1.5
    assert query_number(request("other=1"), "offset", 7) == 7
