"""Why an allowed host was not reached, from the lines that Squid logs."""

from __future__ import annotations

from typing import Any

import pytest

from hostruntime.network.unreached import failed_tunnels, unresolved_hosts


def tunnel(**changes: Any) -> dict[str, Any]:
    return {"at": 100.0, "host": "a.test", "via": "4001", **changes}


def failure(**changes: Any) -> dict[str, Any]:
    return {"at": 100.0, "host": "a.test", "via": "4001", "status": 503, "ms": 1, **changes}


@pytest.mark.parametrize(
    ("tunnels", "failures", "reason"),
    [
        ([tunnel()], [failure()], "connection_refused"),
        ([tunnel()], [failure(ms=3_080)], "no_route"),
        ([tunnel()], [failure(ms=21_656)], "timed_out"),
        ([tunnel()], [failure(status=500)], "no_tls"),
        ([tunnel()], [failure(status=200)], None),
        ([tunnel()], [], None),
        # Of another connection, host or time.
        ([tunnel()], [failure(via="4002")], None),
        ([tunnel()], [failure(host="b.test")], None),
        ([tunnel()], [failure(at=90.0)], None),
        ([], [failure()], None),
    ],
)
def test_how_a_tunnel_came_to_nothing(
    tunnels: list[dict[str, Any]], failures: list[dict[str, Any]], reason: str | None
) -> None:
    found = failed_tunnels(tunnels, failures)
    assert [one.reason for one in found] == ([reason] if reason else [])


def test_each_says_that_the_policy_is_not_to_blame() -> None:
    (named,) = unresolved_hosts([{"at": 1.0, "host": "a.test", "port": 443, "error": "x"}])
    (refused,) = failed_tunnels([tunnel()], [failure()])
    for one, words in ((named, "has no address"), (refused, "refused the connection")):
        assert one.message.startswith("a.test is allowed, but could not be reached: ")
        assert words in one.message
