"""Bases that are made on request: ``GET /v1/bases``, builds that wait, sandboxes that can't."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from django.test import Client

from sandboxes_app.models import Sandbox
from templates_app.models import Template
from templates_app.services import driver
from templates_app.services.log import base_lines
from tests.api.asking import post, refusal
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost

NAME = "code-interpreter"
TEMPLATE = {"name": "stack", "base_template": NAME, "recipe": ["pip install polars"]}


@pytest.fixture(autouse=True)
def _not_made_yet(host: FakeHost) -> None:
    host.base_states[NAME] = "missing"
    host.on_request = {NAME}


def build(api: Client) -> Template:
    answer = post(api, "/v1/templates", TEMPLATE)
    assert answer.status_code == 201, answer.content
    run_queue()
    return Template.objects.get(pk=answer.json()["id"])


def told(template: Template) -> list[str]:
    rows = template.events.filter(kind="base").order_by("seq")
    return list(rows.values_list("payload__message", flat=True))


def test_they_are_listed_with_their_state(api: Client, host: FakeHost) -> None:
    listed = {base["id"]: base for base in api.get("/v1/bases").json()["bases"]}
    assert set(listed) == set(host.base_states)
    assert listed["node-22"]["state"] == "ready"
    assert (listed[NAME]["state"], listed[NAME]["on_request"]) == ("missing", True)
    host.request_base(NAME)
    [made] = [base for base in api.get("/v1/bases").json()["bases"] if base["id"] == NAME]
    assert (made["state"], made["progress"]) == ("building", "Building it")
    host.down = True
    refusal(api.get("/v1/bases"), 503, "host_unavailable")


def test_a_build_waits_for_its_base_and_its_log_says_so(api: Client, host: FakeHost) -> None:
    template = build(api)
    assert template.status == "ready"
    assert told(template) == [f"Preparing base {NAME}…", *host.base_messages]
    assert base_lines(template) == told(template)
    # The next one has nothing to wait for.
    assert told(build(api)) == []
    assert host.requested == [NAME]


def test_the_time_it_waits_is_not_the_builds(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = build(api)
    waited = template.events.filter(kind="base").order_by("-seq").first()
    assert waited is not None
    assert template.started_at is not None
    assert template.started_at > waited.at


def test_why_it_could_not_be_made_is_the_builds_failure(api: Client, host: FakeHost) -> None:
    host.base_error = "No package index answers."
    failed = build(api)
    assert (failed.status, failed.error_code) == ("failed", "base_failed")
    assert "No package index answers." in failed.error_message
    assert host.built == {failed.image_id: host.built[failed.image_id]}
    assert host.built[failed.image_id].starts == 0
    # It can be tried again.
    host.base_error = None
    assert build(api).status == "ready"


def test_a_host_that_restarts_meanwhile_is_waited_for(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "MAX_BACKOFF", 0.0)
    host.killed_while_making = 2
    template = build(api)
    assert template.status == "ready"
    assert told(template) == [f"Preparing base {NAME}…", *host.base_messages]


def test_the_patience_with_a_host_begins_anew_once_it_has_answered(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def takes_long() -> None:
        nonlocal now
        now += 2 * driver.PATIENCE_SECONDS

    clock = SimpleNamespace(monotonic=lambda: now, sleep=lambda _: None)
    monkeypatch.setattr(driver, "time", clock)
    host.between_messages, host.killed_while_making = takes_long, 2
    assert build(api).status == "ready"


def test_whoever_cancels_waits_no_more(api: Client, host: FakeHost) -> None:
    answer = post(api, "/v1/templates", TEMPLATE).json()
    host.between_messages = lambda: post(api, f"/v1/templates/{answer['id']}/cancel", {})
    run_queue()
    template = Template.objects.get(pk=answer["id"])
    assert (template.status, template.error_code) == ("failed", "build_cancelled")
    assert all(not made.starts for made in host.built.values())


def test_whoever_cancels_waits_no_more_although_nothing_new_is_told(
    api: Client, host: FakeHost
) -> None:
    """Or each build that is cancelled during a long step would keep a worker's thread till then."""
    answer = post(api, "/v1/templates", TEMPLATE).json()
    told_nothing = 0

    def cancel() -> None:
        nonlocal told_nothing
        told_nothing += 1
        if told_nothing == 2:
            assert post(api, f"/v1/templates/{answer['id']}/cancel", {}).status_code == 200

    host.base_messages = ["Step 1 of 1: pip install it", *[""] * 9]
    host.between_messages = cancel
    run_queue()
    assert Template.objects.get(pk=answer["id"]).error_code == "build_cancelled"
    assert told_nothing == 2


def test_a_sandbox_has_it_made_and_is_told_to_come_again(api: Client, host: FakeHost) -> None:
    answer = post(api, "/v1/sandboxes", {"template": NAME})
    said = refusal(answer, 503, "fleet_full_retry")
    assert NAME in said["detail"]
    # The official client tries again while this fits into its minute.
    assert 0 < int(answer.headers["Retry-After"]) <= 30
    assert host.requested == [NAME]
    assert not Sandbox.objects.exists()
    refusal(post(api, "/v1/sandboxes", {"template": NAME}), 503, "fleet_full_retry")
    host.base_states[NAME] = "ready"
    assert post(api, "/v1/sandboxes", {"template": NAME}).status_code == 201


def test_a_sandbox_is_told_why_there_is_none_and_it_is_tried_again(
    api: Client, host: FakeHost
) -> None:
    host.base_states[NAME], host.base_error = "failed", "The disk is full"
    said = refusal(post(api, "/v1/sandboxes", {"template": NAME}), 503, "host_unavailable")
    assert "The disk is full." in said["detail"]
    assert host.base_states[NAME] == "building"
    assert not Sandbox.objects.exists()
