"""``GET /v1/sandboxes/{id}/metrics``: telemetry, and no error whatever became of the sandbox."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    body = {"template": "debian-12", "size": "medium"}
    answer = api.post(URL, body, content_type="application/json")
    return str(answer.json()["id"])


def metrics(api: Client, box: str, query: str = "") -> Any:
    return api.get(f"{URL}/{box}/metrics{query}").json()


def test_a_running_sandbox_shows_what_it_uses(api: Client, box: str) -> None:
    told = metrics(api, box)
    assert (told["sandbox_id"], told["sandbox_status"]) == (box, "running")
    assert (told["sample_interval_seconds"], told["window_seconds"]) == (2, 60)
    assert told["cpu"] == {"cores": 2.0, "usage_cores": 0.5, "usage_percent": 25.0}
    limit = 4096 * 1024 * 1024
    assert told["memory"] == {
        "limit_bytes": limit,
        "usage_bytes": 100_000_000,
        "usage_percent": 2.33,
    }
    assert told["lifetime"] == {"cpu_seconds": 1.5, "gb_seconds": 2.5}
    assert told["disk"] == {"usage_bytes": 2_000_000}
    assert told["network"] == {"sent_bytes": 3000, "received_bytes": 4000}
    assert [one["t"] for one in told["samples"]] == [
        "1970-01-01T00:16:40.000Z",
        "1970-01-01T00:16:42.000Z",
    ]


def test_since_leaves_out_what_is_known_and_nothing_else(api: Client, box: str) -> None:
    told = metrics(api, box, "?since=1000")
    # What was before the samples comes from the sandbox's history, and nothing twice.
    whole = metrics(api, box, "?since=0")["samples"]
    assert [one["mem_bytes"] for one in whole] == [90_000_000, 120_000_000, 120_000_000]
    assert whole[0] == {
        "t": "1970-01-01T00:16:10.000Z",
        "cpu_percent": 25.0,
        "mem_bytes": 90_000_000,
        "seconds": 30.0,
        "disk_bytes": 1_000_000,
        "sent_bytes": None,
        "received_bytes": None,
    }
    assert [one["mem_bytes"] for one in told["samples"]] == [120_000_000]
    assert metrics(api, box, "?since=")["samples"] == metrics(api, box)["samples"]
    told = metrics(api, box, "?since=1002")
    assert told["samples"] == []
    assert told["cpu"]["usage_cores"] == 0.5


@pytest.mark.parametrize("since", ["-1", "1.5", "x", "9" * 30, f"{'0' * 20}{'9' * 400}", "\u0664"])
def test_a_since_that_is_no_time(api: Client, box: str, since: str) -> None:
    answer = api.get(f"{URL}/{box}/metrics", {"since": since})
    assert (answer.status_code, list(answer.json()["fields"])) == (400, ["since"])


def test_a_paused_or_ended_one_has_no_live_figures(api: Client, host: FakeHost, box: str) -> None:
    api.post(f"{URL}/{box}/pause", {}, content_type="application/json")
    told = metrics(api, box)
    assert told["sandbox_status"] == "paused"
    assert (told["cpu"]["usage_cores"], told["memory"]["usage_bytes"]) == (None, None)
    assert told["lifetime"]["cpu_seconds"] == 1.5
    api.delete(f"{URL}/{box}")
    told = metrics(api, box)
    assert (told["sandbox_status"], told["samples"]) == ("terminated", [])
    assert told["memory"]["usage_bytes"] is None
    assert told["memory"]["limit_bytes"] == 4096 * 1024 * 1024
    assert (told["disk"], told["network"]["sent_bytes"]) == ({"usage_bytes": None}, None)
    # What it used is known for another day, to who asks for more than the last minute.
    assert len(metrics(api, box, "?since=0")["samples"]) == 2


def test_one_whose_container_has_just_gone(api: Client, host: FakeHost, box: str) -> None:
    host.end(box, "exited")
    assert metrics(api, box)["memory"]["usage_bytes"] is None


def test_a_host_that_is_away_says_so(api: Client, host: FakeHost, box: str) -> None:
    host.down = True
    assert api.get(f"{URL}/{box}/metrics").status_code == 503
