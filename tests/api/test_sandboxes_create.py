"""``POST /v1/sandboxes``."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.test import Client
from pytest_django import DjangoAssertNumQueries

from hostruntime.errors import HostFault
from orkestr_console.accounts.models import Plan, Team
from sandboxes_app.models import Sandbox, SandboxEvent
from templates_app.models import Template
from tests.api.asking import post, refusal
from tests.conftest import MakeKey, api_client
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"
GOOD = {"template": "debian-12"}
RESTRICTED = {**GOOD, "network": "restricted"}
ANSWERED = {
    "id", "status", "template", "network", "cpu", "memory_mb", "region", "created_at",
    "expires_at", "on_timeout", "auto_resume", "preview_auth", "preview_auth_token",
    "paused_expires_at", "node_id", "metadata", "volume", "preview_host_base",
}  # fmt: skip

# What the official SDK sends when nothing but the template is asked for.
SDKS = {
    "template": "debian-12",
    "size": "small",
    "network": "off",
    "timeout_seconds": 600,
    "on_timeout": "kill",
    "auto_resume": False,
    "preview_auth": False,
    "env": {},
    "metadata": {},
}


def nothing_is_left(host: FakeHost) -> bool:
    return not Sandbox.objects.exists() and host.booted == {}


def test_it_answers_when_the_sandbox_runs(api: Client, host: FakeHost, team: Team) -> None:
    asked = time.time()
    answer = post(api, URL, SDKS)
    assert answer.status_code == 201
    said = answer.json()
    assert said.keys() >= ANSWERED
    assert said["id"].startswith("sbx_0")
    assert (said["status"], said["template"], said["network"]) == ("running", "debian-12", "off")
    assert (said["cpu"], said["memory_mb"], said["on_timeout"]) == (1.0, 1024, "kill")
    assert said["region"]
    assert said["node_id"]
    assert "env" not in said
    info = host.booted[said["id"]].info
    assert info.image == "debian-12"
    assert info.deadline is not None
    assert asked + 600 <= info.deadline <= time.time() + 600
    kinds = list(SandboxEvent.objects.values_list("kind", "to_status"))
    assert kinds == [("created", "starting"), ("running", "running")]


def test_the_template_is_all_that_is_needed(api: Client, host: FakeHost) -> None:
    assert post(api, URL, GOOD).json()["status"] == "running"


@pytest.mark.parametrize(
    ("size", "cpu", "memory_mb"), [("small", 1, 1024), ("medium", 2, 4096), ("large", 4, 8192)]
)
def test_the_sizes(api: Client, host: FakeHost, size: str, cpu: int, memory_mb: int) -> None:
    said = post(api, URL, {**GOOD, "size": size}).json()
    assert (said["cpu"], said["memory_mb"]) == (cpu, memory_mb)


def test_a_ready_template_boots_like_a_built_in_one(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    said = post(api, URL, {"template": template.pk, "size": "small"}).json()
    assert (said["status"], said["template"]) == ("running", template.pk)
    assert host.booted[said["id"]].info.image == template.image_id
    assert Sandbox.objects.get().template_name == "tools"


def test_the_deprecated_alias_boots_debian(api: Client, host: FakeHost) -> None:
    said = post(api, URL, {"template": "ubuntu-24.04"}).json()
    assert said["template"] == "ubuntu-24.04"
    assert host.booted[said["id"]].info.image == "debian-12"


def test_environment_metadata_and_allowlist_go_where_they_belong(
    api: Client, host: FakeHost
) -> None:
    body = {
        **GOOD,
        "network": "restricted",
        "env": {"COLOUR": "blue", "_x": "ü=\n"},
        "metadata": {"user id": "42", "é": ""},
        "allow_domains": ["Example.ORG.", "*.bücher.example"],
    }
    said = post(api, URL, body).json()
    assert said["metadata"] == {"user id": "42", "é": ""}
    assert host.booted[said["id"]].env == {"COLOUR": "blue", "_x": "ü=\n"}
    row = Sandbox.objects.get()
    assert row.allow_domains == ["example.org", "xn--bcher-kva.example"]


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({}, "", "exactly one of"),
        ({"template": None}, "", "exactly one of"),
        ({"template": ""}, "", "exactly one of"),
        ({"template": "debian-12", "snapshot": "snap_1"}, "", "exactly one of"),
        ({"template": 5}, "template", "must be a string"),
        ({"template": "windows-95"}, "template", "debian-12"),
        ({"template": "../images/debian-12"}, "template", "debian-12"),
        ({"template": "x" * 10_000}, "template", "debian-12"),
        ({"template": "img_01ARZ3NDEKTSV4RRFFQ69G5FAV"}, "template", "debian-12"),
        ({**GOOD, "size": "huge"}, "size", "'small', 'medium' or 'large'"),
        ({**GOOD, "size": None}, "size", "'small'"),
        ({**GOOD, "network": "wifi"}, "network", "'restricted'"),
        ({**GOOD, "timeout_seconds": 9}, "timeout_seconds", "at least 10"),
        ({**GOOD, "timeout_seconds": -1}, "timeout_seconds", "at least 10"),
        ({**GOOD, "timeout_seconds": "600"}, "timeout_seconds", "whole number"),
        ({**GOOD, "timeout_seconds": 60.5}, "timeout_seconds", "whole number"),
        ({**GOOD, "timeout_seconds": True}, "timeout_seconds", "whole number"),
        ({**GOOD, "timeout_seconds": None}, "timeout_seconds", "whole number"),
        ({**GOOD, "on_timeout": "explode"}, "on_timeout", "'kill' or 'pause'"),
        ({**GOOD, "auto_resume": "no"}, "auto_resume", "true or false"),
        ({**GOOD, "env": ["A=b"]}, "env", "must be an object"),
        ({**GOOD, "env": {"A": 1}}, "env.A", "must be a string"),
        ({**GOOD, "env": {"1A": "x"}}, "env", "1A"),
        ({**GOOD, "env": {"A=B": "x"}}, "env", "A=B"),
        ({**GOOD, "env": {"": "x"}}, "env", "variable"),
        ({**GOOD, "env": {"A": "x\0y"}}, "env.A", "NUL"),
        ({**GOOD, "env": {"A": "x" * 70_000}}, "env", "65,536"),
        ({**GOOD, "metadata": {"a": 1}}, "metadata.a", "must be a string"),
        ({**GOOD, "metadata": {"a": None}}, "metadata.a", "must be a string"),
        ({**GOOD, "metadata": {"": "x"}}, "metadata", "blank name"),
        ({**GOOD, "metadata": {str(n): "x" for n in range(65)}}, "metadata", "at most 64"),
        ({**GOOD, "metadata": {"a": "x" * 17_000}}, "metadata", "16,384"),
        ({**GOOD, "allow_domains": "example.org"}, "allow_domains", "must be a list"),
        ({**RESTRICTED, "allow_domains": ["http://x.org"]}, "allow_domains", "host name"),
        ({**RESTRICTED, "allow_domains": ["10.0.0.1"]}, "allow_domains", "address"),
        ({**GOOD, "region": "mars-1"}, "region", "not a region"),
        ({**GOOD, "volume": "../data"}, "volume", "1 to 63 letters"),
        ({**GOOD, "volume": "vol_data"}, "volume", "as ids do"),
        ({**GOOD, "colour": "red"}, "colour", "not a known field"),
    ],
)  # fmt: skip
def test_bad_input_names_the_field_and_leaves_nothing(
    api: Client, host: FakeHost, body: dict[str, Any], field: str, says: str
) -> None:
    said = refusal(post(api, URL, body), 400, "invalid_request")
    assert says in said["detail"], said
    if field:
        assert said["detail"].startswith(f"{field}: "), said
        assert field in said["fields"]
    assert nothing_is_left(host)


@pytest.mark.parametrize("template", ["tmpl_01ARZ3NDEKTSV4RRFFQ69G5FAV", "tmpl_x", "tmpl_"])
def test_an_unknown_template_is_not_found(api: Client, host: FakeHost, template: str) -> None:
    refusal(post(api, URL, {"template": template}), 404, "not_found")
    assert nothing_is_left(host)


def test_another_teams_template_is_not_found_by_its_id_nor_by_its_images(
    other_api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    refusal(post(other_api, URL, {"template": template.pk}), 404, "not_found")
    refusal(post(other_api, URL, {"template": template.image_id}), 400, "invalid_request")
    assert nothing_is_left(host)


@pytest.mark.parametrize(("status", "says"), [("building", "still building"), ("failed", "failed")])
def test_a_template_that_is_not_ready_is_a_conflict(
    api: Client, host: FakeHost, make_template: MakeTemplate, status: str, says: str
) -> None:
    template = make_template()
    Template.objects.update(status=status)
    said = refusal(post(api, URL, {"template": template.pk}), 409, "template_not_ready")
    assert says in said["detail"]
    assert nothing_is_left(host)


def test_a_ready_template_whose_image_is_gone_says_so(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    host.stored.clear()
    said = refusal(post(api, URL, {"template": template.pk}), 409, "template_not_ready")
    assert "build" in said["detail"]
    assert nothing_is_left(host)


def test_a_full_host_leaves_nothing_and_says_when_to_try_again(api: Client, host: FakeHost) -> None:
    host.full = True
    answer = post(api, URL, GOOD)
    refusal(answer, 503, "fleet_full_retry")
    assert int(answer.headers["Retry-After"]) > 0
    assert nothing_is_left(host)
    host.full = False
    assert post(api, URL, GOOD).status_code == 201


def test_a_host_that_is_away_costs_no_slot(api: Client, host: FakeHost, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_sandboxes=1)
    host.down = True
    answer = post(api, URL, GOOD)
    refusal(answer, 503, "host_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert not Sandbox.objects.live().exists()
    host.down = False
    assert post(api, URL, GOOD).status_code == 201


def test_a_host_that_fails_leaves_a_row_that_says_so(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise HostFault("mount: no such device /dev/secret")

    monkeypatch.setattr(host, "create_sandbox", broken)
    said = refusal(post(api, URL, GOOD), 500, "internal_error")
    assert "secret" not in str(said)
    row = Sandbox.objects.get()
    assert (row.status, bool(row.error_message), row.ended_at is None) == ("failed", True, False)


def test_the_plans_concurrent_cap_counts_what_lives(
    api: Client, host: FakeHost, team: Team
) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_sandboxes=2)
    first, _ = (post(api, URL, GOOD).json()["id"] for _ in range(2))
    said = refusal(post(api, URL, GOOD), 403, "plan_limit")
    assert "2 of the 2" in said["detail"]
    assert "terminate" in said["detail"]
    api.delete(f"{URL}/{first}")
    assert post(api, URL, GOOD).status_code == 201


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"size": "medium"}, "medium"),
        ({"timeout_seconds": 3601}, "3600"),
        ({"network": "open"}, "restricted"),
        ({"network": "restricted", "allow_domains": ["example.org"]}, "allow_domains"),
    ],
)
def test_what_the_free_plan_lacks_is_a_plan_limit(
    db: None, host: FakeHost, make_key: MakeKey, extra: dict[str, Any], says: str
) -> None:
    free = Team.objects.create(name="Free", slug="free", plan_id="free")
    api = api_client(make_key(free))
    said = refusal(post(api, URL, {**GOOD, **extra}), 403, "plan_limit")
    assert says in said["detail"]
    assert nothing_is_left(host)


def test_the_hot_path_asks_the_database_little(
    api: Client, host: FakeHost, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    post(api, URL, GOOD)
    # The token, its rate, the team, the count, the row, its two events, its start, and four
    # notices; the rest are savepoints, which only tests have.
    with django_assert_max_num_queries(18):
        box = post(api, URL, GOOD).json()["id"]
    with django_assert_max_num_queries(4):
        assert post(api, f"{URL}/{box}/exec", {"command": "true"}).status_code == 200
