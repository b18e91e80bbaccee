"""``GET /v1/templates`` and ``GET /v1/templates/{id}``."""

from __future__ import annotations

import pytest
from django.test import Client
from django.utils import timezone
from pytest_django import DjangoAssertNumQueries

from hostruntime.wire.builds import StartBuild
from templates_app.models import Template
from templates_app.services.record import record
from tests.api.asking import post, refusal
from tests.fakes.fixtures import MakeTemplate, run_queue
from tests.fakes.host import FakeHost

URL = "/v1/templates"
GOOD = {"name": "tools", "base_template": "debian-12", "recipe": ["one", "two"]}


def test_a_ready_template_tells_what_came_of_it(api: Client, make_template: MakeTemplate) -> None:
    template = make_template(recipe=["one", "two"])
    said = api.get(f"{URL}/{template.pk}").json()
    assert said["status"] == "ready"
    assert said["error_message"] is None
    assert (said["size_bytes"], said["file_count"], said["shared_bytes"]) == (5_000, 42, 4_000)
    assert said["build_ms"] == 1234
    assert said["ready_at"] == said["finished_at"] >= said["created_at"]
    steps = [(s["number"], s["command"], s["status"], s["exit_code"]) for s in said["steps"]]
    assert steps == [(1, "one", "succeeded", 0), (2, "two", "succeeded", 0)]
    assert said["steps"][1]["output"] == "two: done\n"
    assert said["steps"][1]["duration_ms"] == 7


def test_a_failed_template_tells_why_and_what_never_ran(api: Client, host: FakeHost) -> None:
    host.by_itself = False
    created = post(api, URL, {**GOOD, "recipe": ["one", "two", "three"]}).json()
    build = Template.objects.get().image_id
    host.start_build(
        StartBuild(build, base_image="debian-12", recipe=["one", "two", "three"], network="open")
    )
    host.run_step(build, 1, "one", "fine\n")
    host.run_step(build, 2, "two", "no such package\n", code=100)
    message = "Step 2 of 3 failed: `two` exited with status 100.\n\nno such package\n"
    host.emit(build, "failed", code="step_failed", message=message, step=2)
    run_queue()
    said = api.get(f"{URL}/{created['id']}").json()
    assert (said["status"], said["error_code"]) == ("failed", "step_failed")
    assert said["error_message"] == message
    assert [step["status"] for step in said["steps"]] == ["succeeded", "failed", "skipped"]
    assert said["steps"][1]["output"] == "no such package\n"
    assert said["steps"][2]["started_at"] is None
    assert (said["ready_at"], said["size_bytes"]) == (None, None)
    assert host.stored == {}


def test_the_list_is_newest_first_and_the_teams_own(
    api: Client, other_api: Client, host: FakeHost
) -> None:
    ids = [post(api, URL, {**GOOD, "name": name}).json()["id"] for name in ("a", "b", "c")]
    said = api.get(URL).json()
    assert [row["id"] for row in said["templates"]] == ids[::-1]
    assert said["next_cursor"] is None
    assert {row["status"] for row in said["templates"]} == {"building"}
    assert other_api.get(URL).json() == {"templates": [], "next_cursor": None}


def test_pages_follow_each_other_without_gap_or_repeat(api: Client, host: FakeHost) -> None:
    ids = [post(api, URL, GOOD).json()["id"] for _ in range(4)]
    # So many may build at once; a fifth when these have ended.
    run_queue()
    ids.append(post(api, URL, GOOD).json()["id"])
    # All of the same moment, so that only the id orders them.
    Template.objects.update(created_at=timezone.now())
    seen: list[str] = []
    cursor = None
    for _ in range(3):
        query = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        said = api.get(URL, query).json()
        seen += [row["id"] for row in said["templates"]]
        cursor = said["next_cursor"]
    assert seen == sorted(ids, reverse=True)
    assert cursor is None


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5", "²", "99999999999999999999"])
def test_a_limit_that_is_none_is_refused(api: Client, limit: str) -> None:
    said = refusal(api.get(URL, {"limit": limit}), 400, "invalid_request")
    assert said["detail"].startswith("limit: ")


def test_a_limit_past_the_servers_own_is_lowered(api: Client) -> None:
    assert api.get(URL, {"limit": "1000"}).status_code == 200


@pytest.mark.parametrize(
    "cursor",
    ["x", "W10:1vqz:abc", "a:b:c", "é", "eyJhIjoxfQ", "'; drop table", "A" * 9000, "%00"],
)
def test_a_cursor_nobody_gave_is_refused(api: Client, cursor: str) -> None:
    said = refusal(api.get(URL, {"cursor": cursor}), 400, "invalid_request")
    assert said["detail"].startswith("cursor: ")


def test_a_list_costs_the_same_however_long(
    api: Client, host: FakeHost, django_assert_max_num_queries: DjangoAssertNumQueries
) -> None:
    for _ in range(4):
        post(api, URL, GOOD)
    api.get(URL)
    # The token, its rate, the rows.
    with django_assert_max_num_queries(3):
        assert len(api.get(URL).json()["templates"]) == 4


@pytest.mark.parametrize(
    "template_id",
    ["tmpl_01ARZ3NDEKTSV4RRFFQ69G5FAV", "tmpl_", "x", "tmpl_01arz3ndektsv4rrffq69g5fav", "%F0"],
)
def test_an_unknown_or_malformed_id_is_not_found(api: Client, template_id: str) -> None:
    for ask in (api.get, api.delete):
        refusal(ask(f"{URL}/{template_id}"), 404, "not_found")


def test_another_teams_template_is_not_found(
    api: Client, other_api: Client, make_template: MakeTemplate
) -> None:
    path = f"{URL}/{make_template().pk}"
    theirs = refusal(other_api.get(path), 404, "not_found")
    nobodys = refusal(other_api.get(f"{URL}/tmpl_01ARZ3NDEKTSV4RRFFQ69G5FAV"), 404, "not_found")
    assert theirs == nobodys
    refusal(other_api.delete(path), 404, "not_found")
    assert api.get(path).status_code == 200


def test_a_step_with_much_output_shows_the_end_of_it(
    api: Client, make_template: MakeTemplate
) -> None:
    template = make_template()
    template.steps.update(output="x" * 900_000 + "the end", output_bytes=900_007)
    [step] = api.get(f"{URL}/{template.pk}").json()["steps"]
    assert step["output"].endswith("the end")
    assert len(step["output"]) < 100_000
    assert step["output_truncated"] is True
    assert step["output_bytes"] == 900_007


def test_a_running_step_shows_what_it_printed_so_far(api: Client, host: FakeHost) -> None:
    host.by_itself = False
    created = post(api, URL, GOOD).json()
    template = Template.objects.get()
    Template.objects.update(driver="drv_test")
    host.start_build(
        StartBuild(template.image_id, base_image="debian-12", recipe=["one"], network="open")
    )
    host.emit(template.image_id, "step_started", step=1, total=2, command="one")
    host.emit(template.image_id, "output", step=1, text="half ")
    host.emit(template.image_id, "output", step=1, text="way")
    for event in host.build_events(template.image_id, follow=False):
        record(template, "drv_test", event)
    steps = api.get(f"{URL}/{created['id']}").json()["steps"]
    assert [(s["status"], s["output"]) for s in steps] == [("running", "half way"), ("pending", "")]
