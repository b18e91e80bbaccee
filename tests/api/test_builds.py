"""Cancelling a build, its events and its log, and what a request may ask of a build's time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.test import Client

from hostruntime.wire.builds import StartBuild
from orkestr_console.accounts.models import Plan, Team
from templates_app.models import Template
from templates_app.services import queue
from templates_app.services.driver import follow
from tests.api.asking import post, refusal
from tests.fakes.fixtures import MakeTemplate, queued, run_queue
from tests.fakes.host import FakeHost

URL = "/v1/templates"
GOOD = {"name": "tools", "base_template": "debian-12", "recipe": ["one", "two"]}

# A stream reads on a thread of its own.
COMMITS = pytest.mark.django_db(transaction=True)


@pytest.fixture
def building(api: Client, host: FakeHost) -> Template:
    """A template whose build runs on the host, and goes no further by itself."""
    host.by_itself = False
    created = post(api, URL, GOOD).json()
    template = Template.objects.get(pk=created["id"])
    assert queue.claim_next("drv_test") == template
    host.start_build(
        StartBuild(
            template.image_id, base_image="debian-12", recipe=GOOD["recipe"], network="restricted"
        )
    )
    return template


def test_a_cancelled_build_is_failed_at_once(
    api: Client, building: Template, host: FakeHost
) -> None:
    said = post(api, f"{URL}/{building.pk}/cancel").json()
    assert (said["status"], said["error_code"]) == ("failed", "build_cancelled")
    assert "cancelled by the token 'Test'" in said["error_message"]
    assert {step["status"] for step in said["steps"]} == {"skipped"}
    events = api.get(f"{URL}/{building.pk}/events").json()
    assert events["ended"] is True
    assert events["events"][-1]["kind"] == "failed"
    assert events["events"][-1]["code"] == "build_cancelled"
    run_queue()
    assert host.built[building.image_id].state == "cancelled"


def test_the_last_of_the_disk_space_is_taken_once(
    api: Client, building: Template, host: FakeHost, team: Team
) -> None:
    """Each had room when it was asked for: how much an image takes is known when it is built."""
    other = {"base_template": "debian-12", "base_image": "debian-12", "recipe": ["true"]}
    sizes = {"size_bytes": 5_000_000, "shared_bytes": 1_000_000}
    Template.objects.create(team=team, name="other", status="ready", **other, **sizes)
    Plan.objects.filter(pk="team").update(template_disk_mb=4)
    host.finish(building.image_id)
    follow(building, "drv_test")
    said = api.get(f"{URL}/{building.pk}").json()
    assert (said["status"], said["error_code"]) == ("failed", "plan_limit")
    assert "is using 4 of the 4 megabytes of templates" in said["error_message"]
    assert building.image_id not in host.stored


def test_one_with_room_left_may_be_the_one_that_takes_too_much(
    api: Client, building: Template, host: FakeHost
) -> None:
    Plan.objects.filter(pk="team").update(template_disk_mb=1)
    host.finish(building.image_id)
    follow(building, "drv_test")
    assert api.get(f"{URL}/{building.pk}").json()["status"] == "ready"
    assert building.image_id in host.stored


def test_it_cannot_be_published_any_more(api: Client, building: Template, host: FakeHost) -> None:
    """Whatever its driver still hears from a host that was quicker."""
    from templates_app.services.record import Superseded

    building.refresh_from_db()
    host.finish(building.image_id)
    post(api, f"{URL}/{building.pk}/cancel")
    building.handed_over = True
    with pytest.raises(Superseded):
        follow(building, "drv_test")
    assert Template.objects.get(pk=building.pk).status == "failed"
    run_queue()
    assert host.stored == {}


def test_cancelling_again_changes_nothing(api: Client, building: Template) -> None:
    first = post(api, f"{URL}/{building.pk}/cancel").json()
    again = post(api, f"{URL}/{building.pk}/cancel")
    assert (again.status_code, again.json()) == (200, first)


def test_what_has_ended_cannot_be_cancelled(api: Client, make_template: MakeTemplate) -> None:
    template = make_template()
    said = refusal(post(api, f"{URL}/{template.pk}/cancel"), 409, "build_ended")
    assert "is ready" in said["detail"]


def test_a_queued_build_is_cancelled_before_it_begins(api: Client, host: FakeHost) -> None:
    created = post(api, URL, GOOD).json()
    assert created["queue"] == {"place": 1, "waits_for": "host"}
    said = post(api, f"{URL}/{created['id']}/cancel").json()
    assert (said["status"], said["queue"], said["started_at"]) == ("failed", None, None)
    run_queue()
    # Only so that a start that comes late starts nothing.
    assert all(build.starts == 0 for build in host.built.values())


def test_more_builds_than_the_plan_runs_at_once_wait(
    api: Client, team: Team, host: FakeHost
) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_builds=1)
    ids = [post(api, URL, GOOD).json()["id"] for _ in range(3)]
    assert queue.claim_next("drv_1") is not None
    places = [api.get(f"{URL}/{one}").json()["queue"] for one in ids]
    assert places == [
        None,
        {"place": 1, "waits_for": "team"},
        {"place": 2, "waits_for": "team"},
    ]


def test_where_none_may_be_built_none_waits_for_ever(
    api: Client, team: Team, host: FakeHost
) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_builds=0)
    said = refusal(post(api, URL, GOOD), 403, "plan_limit")
    assert "0 of the 0 concurrent builds" in said["detail"]
    assert Template.objects.count() == 0


def test_events_are_numbered_without_a_gap(api: Client, make_template: MakeTemplate) -> None:
    template = make_template(recipe=["one", "two"])
    said = api.get(f"{URL}/{template.pk}/events").json()
    kinds = [event["kind"] for event in said["events"]]
    assert [event["seq"] for event in said["events"]] == list(range(1, len(kinds) + 1))
    assert kinds[:4] == ["queued", "boot", "step_started", "output"]
    assert (kinds[-1], said["ended"], said["next_after"]) == ("published", True, len(kinds))
    assert said["events"][3]["text"] == "one: done\n"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_pages_of_events_make_the_whole(
    api: Client, make_template: MakeTemplate, size: int
) -> None:
    template = make_template(recipe=["one", "two"])
    whole = api.get(f"{URL}/{template.pk}/events").json()["events"]
    found: list[dict[str, Any]] = []
    after, ended = 0, False
    while not ended:
        query = {"after": after, "limit": size}
        said = api.get(f"{URL}/{template.pk}/events", query).json()
        assert said["events"] or said["ended"]
        found += said["events"]
        after, ended = said["next_after"], said["ended"]
    assert found == whole


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "²", "9" * 40])
@pytest.mark.parametrize("follow", ["true", "false"])
def test_a_number_that_is_none_is_refused(
    api: Client, building: Template, after: str, follow: str
) -> None:
    query = {"after": after, "follow": follow}
    said = refusal(api.get(f"{URL}/{building.pk}/events", query), 400, "invalid_request")
    assert said["fields"] == {"after": "must be the number of an event, 0 or more."}
    answer = api.get(f"{URL}/{building.pk}/events", headers={"Last-Event-ID": after})
    refusal(answer, 400, "invalid_request")


def body(answer: Any) -> bytes:
    """A streamed answer's content."""

    async def read() -> bytes:
        return b"".join([part async for part in answer.streaming_content])

    return async_to_sync(read)()


@COMMITS
@pytest.mark.usefixtures("plans")
def test_the_log_as_text(api: Client, make_template: MakeTemplate) -> None:
    template = make_template(recipe=["one", "two"])
    template.steps.filter(number=1).update(output="\x1b[31mred\x1b[0m\r\n10%\r99%\nend")
    answer = api.get(f"{URL}/{template.pk}/log")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert f'filename="{template.pk}.log"' in answer.headers["Content-Disposition"]
    text = body(answer).decode()
    assert "$ one\nred\n99%\nend\n# succeeded: exit 0 after 0.0 s\n" in text
    assert "$ two\ntwo: done\n# succeeded" in text


@COMMITS
@pytest.mark.usefixtures("plans")
def test_the_log_as_json_lines(api: Client, make_template: MakeTemplate) -> None:
    template = make_template(recipe=["one", "two"])
    answer = api.get(f"{URL}/{template.pk}/log", {"format": "jsonl"})
    lines = [json.loads(line) for line in body(answer).splitlines()]
    assert lines == api.get(f"{URL}/{template.pk}/events").json()["events"]


def test_an_unknown_format_is_refused(api: Client, make_template: MakeTemplate) -> None:
    answer = api.get(f"{URL}/{make_template().pk}/log", {"format": "pdf"})
    assert "format" in refusal(answer, 400, "invalid_request")["fields"]


@pytest.mark.parametrize("name", ["step_timeout_seconds", "build_timeout_seconds"])
def test_a_build_may_be_given_less_time_but_not_more(
    api: Client, team: Team, host: FakeHost, name: str
) -> None:
    most = getattr(team.plan, name)
    post(api, URL, {**GOOD, name: most - 1})
    run_queue()
    template = Template.objects.get()
    assert getattr(host.built[template.image_id].request, name) == most - 1
    said = refusal(post(api, URL, {**GOOD, name: most + 1}), 403, "plan_limit")
    assert said["detail"].startswith(f"{name}: at most {most}")
    refusal(post(api, URL, {**GOOD, name: 0}), 400, "invalid_request")
    assert queued() == []


def test_a_build_may_be_given_less_disk(api: Client, host: FakeHost) -> None:
    assert post(api, URL, {**GOOD, "disk_mb": 512}).json()["disk_mb"] == 512
    for wrong in (1, 10**6, "512", 512.5, True):
        refusal(post(api, URL, {**GOOD, "disk_mb": wrong}), 400, "invalid_request")
