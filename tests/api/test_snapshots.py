"""Snapshots over REST: taking, reading, starting from, deleting."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from hostruntime.errors import HostFault, HostFull
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from sandboxes_app.models import Sandbox, Snapshot
from tests.api.asking import post, refusal
from tests.conftest import MakeKey, api_client
from tests.fakes.host import FakeHost

URL, SNAPSHOTS = "/v1/sandboxes", "/v1/sandboxes/snapshots"
ANSWERED = {
    "id", "status", "name", "template", "cpu", "memory_mb", "network", "source_sandbox_id",
    "size_mb", "node_id", "region", "error_message", "created_at", "ready_at",
}  # fmt: skip
# What the official SDK sends to start one.
FORK = {
    "timeout_seconds": 600,
    "on_timeout": "kill",
    "auto_resume": False,
    "preview_auth": False,
    "env": {},
    "metadata": {},
}


@pytest.fixture
def source(api: Client, host: FakeHost) -> str:
    body = {"template": "debian-12", "size": "medium", "network": "restricted"}
    return str(post(api, URL, {**body, "allow_domains": ["example.org"]}).json()["id"])


def take(api: Client, source: str, **body: Any) -> dict[str, Any]:
    answer = post(api, f"{URL}/{source}/snapshots", body)
    assert answer.status_code == 201, answer.content
    said: dict[str, Any] = answer.json()
    return said


def test_taking_one_answers_what_the_contract_says(
    api: Client, host: FakeHost, source: str
) -> None:
    said = take(api, source, name=" before the upgrade ")
    assert said.keys() >= ANSWERED
    assert said["id"].startswith("snap_0")
    assert (said["status"], said["name"]) == ("ready", "before the upgrade")
    assert (said["template"], said["network"], said["cpu"]) == ("debian-12", "restricted", 2.0)
    assert (said["source_sandbox_id"], said["memory_mb"], said["size_mb"]) == (source, 4096, 124)
    assert said["created_at"].endswith("Z")
    assert said["ready_at"] >= said["created_at"]
    assert said["error_message"] is None
    assert list(host.taken) == [said["id"]]
    assert api.get(f"{SNAPSHOTS}/{said['id']}").json() == said
    assert AuditEntry.objects.filter(action="snapshot.create", object_id=said["id"]).count() == 1


def test_a_name_may_be_left_out_and_is_not_endless(api: Client, source: str) -> None:
    assert take(api, source)["name"] is None
    answer = post(api, f"{URL}/{source}/snapshots", {"name": "x" * 101})
    assert "name" in refusal(answer, 400, "invalid_request")["fields"]


def test_they_are_listed_newest_first_a_page_at_a_time(api: Client, source: str) -> None:
    made = [take(api, source, name=str(number))["id"] for number in range(3)]
    first = api.get(SNAPSHOTS, {"limit": "2"}).json()
    assert [one["id"] for one in first["snapshots"]] == made[:0:-1]
    rest = api.get(SNAPSHOTS, {"limit": "2", "cursor": first["next_cursor"]}).json()
    assert [one["id"] for one in rest["snapshots"]] == made[:1]
    assert rest["next_cursor"] is None


def test_a_sandbox_starts_from_one_as_the_sdk_asks(
    api: Client, host: FakeHost, source: str
) -> None:
    host.write_file(source, "/workspace/mark", b"before")
    snapshot = take(api, source)["id"]
    host.write_file(source, "/workspace/mark", b"after")
    said = post(api, URL, {**FORK, "snapshot": snapshot}).json()
    assert (said["status"], said["template"], said["cpu"]) == ("running", "debian-12", 2.0)
    assert said["memory_mb"] == 4096
    assert host.booted[said["id"]].files["/workspace/mark"] == b"before"
    # Its network is the snapshot's, never wider than its sandbox's was.
    assert said["network"] == host.booted[said["id"]].info.network == "restricted"
    assert Sandbox.objects.get(pk=said["id"]).allow_domains == ["example.org"]


def test_a_network_that_is_named_counts(api: Client, source: str) -> None:
    snapshot = take(api, source)["id"]
    said = post(api, URL, {"snapshot": snapshot, "network": "off"}).json()
    assert said["network"] == "off"
    assert Sandbox.objects.get(pk=said["id"]).allow_domains is None


def test_a_token_is_held_to_its_templates_and_networks(
    api: Client, source: str, make_key: MakeKey, team: Team
) -> None:
    snapshot = take(api, source)["id"]
    limited = api_client(make_key(team))
    team.tokens.update(allowed_templates=["node-22"])
    refusal(post(limited, URL, {"snapshot": snapshot}), 403, "token_restricted")
    team.tokens.update(allowed_templates=None, allowed_networks=["off"])
    refusal(post(limited, URL, {"snapshot": snapshot}), 403, "network_policy_blocked")
    assert post(limited, URL, {"snapshot": snapshot, "network": "off"}).status_code == 201


def test_deleting_is_final_and_may_be_repeated(api: Client, host: FakeHost, source: str) -> None:
    snapshot = take(api, source)["id"]
    assert api.delete(f"{SNAPSHOTS}/{snapshot}").status_code == 204
    assert host.taken == {}
    assert api.delete(f"{SNAPSHOTS}/{snapshot}").status_code == 204
    refusal(api.get(f"{SNAPSHOTS}/{snapshot}"), 404, "not_found")
    assert api.get(SNAPSHOTS).json()["snapshots"] == []
    refusal(post(api, URL, {"snapshot": snapshot}), 404, "not_found")
    assert AuditEntry.objects.filter(action="snapshot.delete", object_id=snapshot).count() == 1


def test_a_sandbox_that_does_not_run_has_nothing_to_take(
    api: Client, host: FakeHost, source: str
) -> None:
    api.delete(f"{URL}/{source}")
    refusal(post(api, f"{URL}/{source}/snapshots", {}), 409, "sandbox_not_running")
    assert not Snapshot.objects.exists()


def test_one_that_ends_meanwhile_is_told_as_ended(api: Client, host: FakeHost, source: str) -> None:
    host.end(source, "exited")
    refusal(post(api, f"{URL}/{source}/snapshots", {}), 409, "sandbox_not_running")
    assert Snapshot.objects.get().status == "failed"
    assert Sandbox.objects.get(pk=source).status == "failed"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [(HostFull("x"), 503, "fleet_full_retry"), (HostFault("x"), 500, "internal_error")],
)
def test_a_capture_that_fails_says_why_and_counts_for_nothing(
    api: Client, host: FakeHost, source: str, error: HostFault, status: int, code: str
) -> None:
    host.capture_fails = error
    refusal(post(api, f"{URL}/{source}/snapshots", {}), status, code)
    [said] = api.get(SNAPSHOTS).json()["snapshots"]
    assert said["status"] == "failed"
    assert said["error_message"]
    assert host.taken == {}
    refusal(post(api, URL, {"snapshot": said["id"]}), 409, "snapshot_not_ready")
    Plan.objects.filter(pk="team").update(max_named_snapshots=1)
    host.capture_fails = None
    take(api, source)


def test_the_cap_counts_what_is_kept(api: Client, source: str) -> None:
    Plan.objects.filter(pk="team").update(max_named_snapshots=1)
    first = take(api, source)["id"]
    said = refusal(post(api, f"{URL}/{source}/snapshots", {}), 409, "snapshot_cap_reached")
    assert (said["limit"], said["used"], said["max"]) == ("max_named_snapshots", 1, 1)
    # So does their disk space.
    Plan.objects.filter(pk="team").update(max_named_snapshots=5, snapshot_disk_mb=1)
    said = refusal(post(api, f"{URL}/{source}/snapshots", {}), 409, "snapshot_cap_reached")
    assert (said["limit"], said["used"], said["max"]) == ("snapshot_disk_mb", 124, 1)
    assert "delete a snapshot" in said["detail"]
    api.delete(f"{SNAPSHOTS}/{first}")
    take(api, source)


def test_one_that_the_host_lost_is_said_to_be(api: Client, host: FakeHost, source: str) -> None:
    snapshot = take(api, source)["id"]
    host.taken.clear()
    refusal(post(api, URL, {"snapshot": snapshot}), 409, "snapshot_not_ready")
    assert api.get(f"{SNAPSHOTS}/{snapshot}").json()["status"] == "failed"
    assert len(host.booted) == Sandbox.objects.count() == 1
