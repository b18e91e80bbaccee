"""Reading sandboxes, ending them, and how long they live."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.db import connection
from django.test import Client
from django.utils import timezone

from orkestr_console.accounts.models import Plan, Team
from sandboxes_app import tasks
from sandboxes_app.models import Sandbox, SandboxEvent
from tests.api.asking import post, refusal
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"
NOBODYS = "sbx_01ARZ3NDEKTSV4RRFFQ69G5FAV"


def boot(api: Client, **changes: object) -> str:
    answer = post(api, URL, {"template": "debian-12", **changes})
    assert answer.status_code == 201, answer.content
    return str(answer.json()["id"])


def age(host: FakeHost, box: str) -> None:
    """Let a sandbox's time be over, on the host as well, which has not ended it yet."""
    end = timezone.now() - timedelta(seconds=1)
    host.set_deadline(box, end.timestamp())
    Sandbox.objects.filter(pk=box).update(expires_at=end)


def test_a_sandbox_is_read_as_it_was_created(api: Client, host: FakeHost) -> None:
    created = post(api, URL, {"template": "debian-12", "metadata": {"a": "b"}}).json()
    assert api.get(f"{URL}/{created['id']}").json() == created


@pytest.mark.parametrize("box", [NOBODYS, "sbx_", "x", NOBODYS.lower(), "limitsx", "%F0"])
def test_an_unknown_or_malformed_id_is_not_found(api: Client, host: FakeHost, box: str) -> None:
    for ask in (api.get, api.delete):
        refusal(ask(f"{URL}/{box}"), 404, "not_found")
    refusal(post(api, f"{URL}/{box}/exec", {"command": "true"}), 404, "not_found")


def test_another_teams_sandbox_is_not_found_whatever_is_asked(
    api: Client, other_api: Client, host: FakeHost
) -> None:
    box = boot(api)
    refusal(other_api.get(f"{URL}/{box}"), 404, "not_found")
    refusal(other_api.delete(f"{URL}/{box}"), 404, "not_found")
    for path, body in (
        ("exec", {"command": "true"}),
        ("exec", {"command": "true", "stream": True}),
        ("timeout", {"timeout_seconds": 60}),
        ("files", {"path": "/tmp/x", "content": ""}),
        ("files/mkdir", {"path": "/tmp/x"}),
        ("files/move", {"source": "/tmp/x", "destination": "/tmp/y"}),
        ("files/batch", {"files": [{"path": "/tmp/x", "content": ""}]}),
    ):
        refusal(post(other_api, f"{URL}/{box}/{path}", body), 404, "not_found")
    for path in ("files", "files/stat"):
        refusal(other_api.get(f"{URL}/{box}/{path}", {"path": "/tmp"}), 404, "not_found")
    assert host.ran == []
    assert api.get(f"{URL}/{box}").json()["status"] == "running"


def test_terminating_ends_the_container_and_keeps_the_row(api: Client, host: FakeHost) -> None:
    box = boot(api)
    for _ in range(2):
        assert api.delete(f"{URL}/{box}").status_code == 204
    assert host.booted == {}
    assert api.get(f"{URL}/{box}").json()["status"] == "terminated"
    refusal(post(api, f"{URL}/{box}/exec", {"command": "true"}), 409, "sandbox_not_running")
    ends = SandboxEvent.objects.filter(to_status="terminated")
    assert [event.from_status for event in ends] == ["running"]


def test_terminating_works_while_the_host_is_away(api: Client, host: FakeHost) -> None:
    box = boot(api)
    host.down = True
    assert api.delete(f"{URL}/{box}").status_code == 204
    assert api.get(f"{URL}/{box}").json()["status"] == "terminated"
    host.down = False
    run_queue()
    assert host.booted == {}


def test_the_list_filters_by_status_and_by_all_of_the_metadata(
    api: Client, other_api: Client, host: FakeHost
) -> None:
    alice = boot(api, metadata={"user": "alice", "kind": "x"})
    bob = boot(api, metadata={"user": "bob", "kind": "x"})
    plain = boot(api)
    gone = boot(api, metadata={"kind": "x"})
    api.delete(f"{URL}/{gone}")

    def listed(**query: str) -> list[str]:
        return [row["id"] for row in api.get(URL, query).json()["sandboxes"]]

    assert listed() == [gone, plain, bob, alice]
    assert listed(status="running") == [plain, bob, alice]
    assert listed(status="terminated") == [gone]
    assert listed(**{"metadata[kind]": "x", "status": "running"}) == [bob, alice]
    assert listed(**{"metadata[kind]": "x", "metadata[user]": "alice"}) == [alice]
    assert listed(**{"metadata[kind]": "y"}) == []
    assert listed(**{"metadata[user]": "ali"}) == []
    assert other_api.get(URL).json() == {"sandboxes": [], "next_cursor": None}


def test_pages_keep_the_filter(api: Client, host: FakeHost) -> None:
    wanted = []
    for n in range(3):
        wanted.append(boot(api, metadata={"kind": "x"}))
        boot(api, metadata={"kind": str(n)})
    query = {"metadata[kind]": "x", "limit": "2"}
    first = api.get(URL, query).json()
    second = api.get(URL, {**query, "cursor": first["next_cursor"]}).json()
    seen = [row["id"] for row in first["sandboxes"] + second["sandboxes"]]
    assert seen == wanted[::-1]
    assert second["next_cursor"] is None


@pytest.mark.parametrize(
    ("query", "field"),
    [({"status": "asleep"}, "status"), ({"limit": "0"}, "limit"), ({"cursor": "x"}, "cursor")],
)
def test_a_query_that_makes_no_sense_names_the_parameter(
    api: Client, query: dict[str, str], field: str
) -> None:
    said = refusal(api.get(URL, query), 400, "invalid_request")
    assert said["detail"].startswith(f"{field}: ")


def test_a_new_lifetime_counts_from_now(api: Client, host: FakeHost) -> None:
    box = boot(api, timeout_seconds=600)
    asked = time.time()
    said = post(api, f"{URL}/{box}/timeout", {"timeout_seconds": 60}).json()
    expires = datetime.fromisoformat(said["expires_at"])
    assert asked + 59 <= expires.timestamp() <= time.time() + 60
    assert host.booted[box].info.deadline == pytest.approx(expires.timestamp(), abs=0.01)
    assert api.get(f"{URL}/{box}").json()["expires_at"] == said["expires_at"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "required"),
        ({"timeout_seconds": 9}, "at least 10"),
        ({"timeout_seconds": "60"}, "whole number"),
        ({"timeout_seconds": 10**30}, ""),
        ({"timeout_seconds": 60, "x": 1}, "not a known field"),
    ],
)
def test_a_lifetime_that_cannot_be_is_refused(
    api: Client, host: FakeHost, body: dict[str, object], says: str
) -> None:
    box = boot(api)
    answer = post(api, f"{URL}/{box}/timeout", body)
    assert answer.status_code in {400, 403}
    assert says in answer.json()["detail"]


def test_a_lifetime_past_the_plans_is_a_plan_limit(api: Client, host: FakeHost, team: Team) -> None:
    box = boot(api)
    longest = team.plan.max_timeout_seconds
    said = refusal(
        post(api, f"{URL}/{box}/timeout", {"timeout_seconds": longest + 1}), 403, "plan_limit"
    )
    assert str(longest) in said["detail"]


def test_a_plan_may_cap_the_whole_running_time(api: Client, host: FakeHost, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_running_lifetime_seconds=100)
    box = boot(api, timeout_seconds=50)
    Sandbox.objects.update(started_at=timezone.now() - timedelta(seconds=60))
    said = refusal(post(api, f"{URL}/{box}/timeout", {"timeout_seconds": 50}), 403, "plan_limit")
    assert said["reason"] == "lifetime_cap_reached"
    assert post(api, f"{URL}/{box}/timeout", {"timeout_seconds": 30}).status_code == 200


def test_a_sandbox_that_ended_gets_no_new_lifetime(api: Client, host: FakeHost) -> None:
    box = boot(api)
    api.delete(f"{URL}/{box}")
    answer = post(api, f"{URL}/{box}/timeout", {"timeout_seconds": 60})
    refusal(answer, 409, "sandbox_not_running")


def test_one_whose_time_is_over_is_terminated_as_soon_as_anybody_looks(
    api: Client, host: FakeHost
) -> None:
    box = boot(api)
    age(host, box)
    refusal(post(api, f"{URL}/{box}/exec", {"command": "true"}), 409, "sandbox_not_running")
    assert api.get(f"{URL}/{box}").json()["status"] == "terminated"
    assert host.ran == []
    assert [e.kind for e in SandboxEvent.objects.filter(to_status="terminated")] == ["expired"]
    run_queue()
    assert host.booted == {}


def test_the_list_shows_none_as_running_whose_time_is_over(api: Client, host: FakeHost) -> None:
    over, alive = boot(api), boot(api)
    age(host, over)
    rows = api.get(URL, {"status": "running"}).json()["sandboxes"]
    assert [row["id"] for row in rows] == [alive]


def test_one_whose_time_is_over_takes_no_slot(api: Client, host: FakeHost, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_sandboxes=1)
    age(host, boot(api))
    boot(api)


@pytest.mark.parametrize(
    ("reason", "status", "words"),
    [
        ("expired", "terminated", None),
        ("exited", "failed", "ran out of memory"),
        ("host_lost", "failed", "The host lost this sandbox"),
        ("out_of_disk", "failed", "The machine's disk was running out"),
    ],
)
def test_one_that_ended_by_itself_is_settled_by_the_next_command(
    api: Client, host: FakeHost, reason: str, status: str, words: str | None
) -> None:
    box = boot(api)
    host.end(box, reason)
    refusal(post(api, f"{URL}/{box}/exec", {"command": "true"}), 409, "sandbox_not_running")
    said = api.get(f"{URL}/{box}").json()
    assert said["status"] == status
    assert said["error_message"] is None if words is None else words in said["error_message"]


def test_limits_are_the_plans(api: Client, host: FakeHost, team: Team) -> None:
    said = api.get(f"{URL}/limits").json()
    assert said["plan"] == "team"
    assert said["allowed_sizes"] == ["small", "medium", "large"]
    assert said["sizes"][0] == {"size": "small", "cpu": 1.0, "memory_mb": 1024, "allowed": True}
    assert said["max_concurrent"] == team.plan.max_concurrent_sandboxes
    assert said["max_timeout_seconds"] == team.plan.max_timeout_seconds
    assert said["custom_egress_allowlist"] is True
    assert said["default_egress_domains"] == ["github.com", "example.org"]
    assert said["regions"][0].keys() == {"id", "label"}
    assert said.keys() >= {
        "max_snapshots", "max_named_snapshots", "trial_credit_eur", "trial_credit_used_eur",
        "max_running_lifetime_seconds",
    }  # fmt: skip


def test_a_smaller_plan_allows_fewer_sizes(other_api: Client, host: FakeHost) -> None:
    sizes = other_api.get(f"{URL}/limits").json()["sizes"]
    assert {row["size"]: row["allowed"] for row in sizes} == {
        "small": True,
        "medium": True,
        "large": False,
    }


def test_what_the_host_takes_long_for_holds_no_connection(
    plans: None, api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many waiting calls as the pool has connections would leave none for anybody else."""
    held: dict[str, bool] = {}

    def watched(name: str) -> Callable[..., Any]:
        ask = getattr(host, name)

        def asked(*args: Any, **kwargs: Any) -> Any:
            held[name] = connection.connection is not None
            return ask(*args, **kwargs)

        return asked

    names = ("create_sandbox", "create_snapshot", "pause_sandbox", "resume_sandbox")
    for name in names:
        monkeypatch.setattr(host, name, watched(name))
    box = post(api, URL, {"template": "debian-12"}).json()["id"]
    for call in ("snapshots", "pause", "resume"):
        assert post(api, f"{URL}/{box}/{call}", {}).status_code < 300, call
    assert held == dict.fromkeys(names, False)


def test_a_clock_that_was_set_forward_ends_nothing_early(api: Client, host: FakeHost) -> None:
    """The host counts seconds: while it says that some are left, they are."""
    box = boot(api)
    end = timezone.now() + timedelta(minutes=9)
    Sandbox.objects.filter(pk=box).update(expires_at=timezone.now() - timedelta(minutes=51))
    host.set_deadline(box, end.timestamp())
    assert api.get(f"{URL}/{box}").json()["status"] == "running"
    assert Sandbox.objects.get(pk=box).expires_at == end
    assert tidied(box) == "running"
    host.set_deadline(box, timezone.now().timestamp())
    Sandbox.objects.filter(pk=box).update(expires_at=timezone.now() - timedelta(minutes=51))
    assert tidied(box) == "terminated"


def tidied(box: str) -> str:
    """The status that the pass of every minute leaves."""
    tasks.tidy()
    return str(Sandbox.objects.get(pk=box).status)


def test_a_host_that_is_away_ends_nothing(api: Client, host: FakeHost) -> None:
    box = boot(api)
    age(host, box)
    host.down = True
    assert api.get(f"{URL}/{box}").json()["status"] == "running"
    host.down = False
    assert api.get(f"{URL}/{box}").json()["status"] == "terminated"
