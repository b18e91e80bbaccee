"""``DELETE /v1/templates/{id}``."""

from __future__ import annotations

from django.test import Client

from hostruntime.wire.builds import StartBuild
from orkestr_console.accounts.models import Plan, Team
from templates_app.models import BuildEvent, BuildStep, Template
from tests.api.asking import post, refusal
from tests.fakes.fixtures import MakeTemplate, run_queue
from tests.fakes.host import FakeHost

URL = "/v1/templates"
GOOD = {"name": "tools", "base_template": "debian-12", "recipe": ["true"]}


def test_it_takes_the_template_and_its_image_away(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    assert template.image_id in host.stored
    answer = api.delete(f"{URL}/{template.pk}")
    assert (answer.status_code, answer.content) == (204, b"")
    refusal(api.get(f"{URL}/{template.pk}"), 404, "not_found")
    assert not BuildStep.objects.exists()
    assert not BuildEvent.objects.exists()
    run_queue()
    assert host.stored == {}


def test_the_slot_is_free_at_once(api: Client, make_template: MakeTemplate, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_templates=1)
    template = make_template()
    refusal(post(api, URL, GOOD), 403, "plan_limit")
    api.delete(f"{URL}/{template.pk}")
    assert post(api, URL, GOOD).status_code == 201


def test_deleting_again_finds_nothing(api: Client, make_template: MakeTemplate) -> None:
    path = f"{URL}/{make_template().pk}"
    assert api.delete(path).status_code == 204
    refusal(api.delete(path), 404, "not_found")


def test_a_building_one_is_cancelled(api: Client, host: FakeHost) -> None:
    host.by_itself = False
    created = post(api, URL, GOOD).json()
    image = Template.objects.get().image_id
    host.start_build(StartBuild(image, base_image="debian-12", recipe=["true"], network="open"))
    assert api.delete(f"{URL}/{created['id']}").status_code == 204
    run_queue()
    assert host.built[image].state == "cancelled"
    assert host.stored == {}
    assert not Template.objects.exists()


def test_one_whose_build_never_started_never_starts(api: Client, host: FakeHost) -> None:
    created = post(api, URL, GOOD).json()
    assert api.delete(f"{URL}/{created['id']}").status_code == 204
    run_queue()
    assert host.stored == {}
    assert not Template.objects.exists()


def test_a_running_sandbox_keeps_working_and_its_image_goes_later(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    box = post(api, "/v1/sandboxes", {"template": template.pk}).json()
    api.delete(f"{URL}/{template.pk}")
    run_queue()
    assert template.image_id in host.stored
    shown = api.get(f"/v1/sandboxes/{box['id']}").json()
    assert (shown["status"], shown["template"]) == ("running", template.pk)
    assert post(api, f"/v1/sandboxes/{box['id']}/exec", {"command": "true"}).status_code == 200
    refusal(post(api, "/v1/sandboxes", {"template": template.pk}), 404, "not_found")


def test_it_works_while_the_host_is_away(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    template = make_template()
    host.down = True
    assert api.delete(f"{URL}/{template.pk}").status_code == 204
    run_queue()
    assert not Template.objects.exists()


def test_a_template_built_on_it_stays(api: Client, make_template: MakeTemplate) -> None:
    base = make_template()
    on_top = make_template(base_template=base.pk)
    api.delete(f"{URL}/{base.pk}")
    run_queue()
    said = api.get(f"{URL}/{on_top.pk}").json()
    assert (said["status"], said["base_template"]) == ("ready", base.pk)


def test_a_token_that_may_only_read_may_not_delete(
    read_only_api: Client, make_template: MakeTemplate
) -> None:
    path = f"{URL}/{make_template().pk}"
    refusal(read_only_api.delete(path), 403, "insufficient_scope")
    assert read_only_api.get(path).status_code == 200
