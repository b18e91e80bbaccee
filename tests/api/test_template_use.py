"""``GET /v1/templates/{id}/usage``: what deleting a template means."""

from __future__ import annotations

from datetime import timedelta

from django.test import Client
from django.utils import timezone

from templates_app.models import Template
from tests.api.asking import post, refusal
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.host import FakeHost

URL = "/v1/templates"


def test_it_says_who_runs_from_it_and_what_comes_back(
    api: Client, make_template: MakeTemplate, host: FakeHost
) -> None:
    template = make_template()
    said = api.get(f"{URL}/{template.pk}/usage").json()
    assert (said["running_sandboxes"], said["sandboxes"], said["last_used_at"]) == (0, [], None)
    ids = [post(api, "/v1/sandboxes", {"template": template.pk}).json()["id"] for _ in range(2)]
    make_template(base_template=template.pk)
    said = api.get(f"{URL}/{template.pk}/usage").json()
    assert [sandbox["id"] for sandbox in said["sandboxes"]] == ids[::-1]
    assert (said["running_sandboxes"], said["derived_templates"]) == (2, 1)
    assert said["last_used_at"] is not None
    # What the fake image does not share with its base.
    assert (said["size_bytes"], said["reclaimable_bytes"]) == (5_000, 1_000)
    api.delete(f"/v1/sandboxes/{ids[0]}")
    said = api.get(f"{URL}/{template.pk}/usage").json()
    assert [sandbox["id"] for sandbox in said["sandboxes"]] == ids[1:]


def test_a_host_that_is_away_leaves_out_the_bytes_alone(
    api: Client, make_template: MakeTemplate, host: FakeHost
) -> None:
    template = make_template()
    host.down = True
    said = api.get(f"{URL}/{template.pk}/usage").json()
    assert (said["reclaimable_bytes"], said["running_sandboxes"]) == (None, 0)


def test_what_has_no_image_gives_nothing_back(api: Client, host: FakeHost) -> None:
    created = post(api, URL, {"name": "x", "base_template": "debian-12", "recipe": ["true"]})
    assert api.get(f"{URL}/{created.json()['id']}/usage").json()["reclaimable_bytes"] == 0


def test_the_last_use_is_noted_once_a_minute(
    api: Client, make_template: MakeTemplate, host: FakeHost
) -> None:
    template = make_template()
    rows = Template.objects.filter(pk=template.pk)
    post(api, "/v1/sandboxes", {"template": template.pk})
    noted = rows.get().last_used_at
    post(api, "/v1/sandboxes", {"template": template.pk})
    assert rows.get().last_used_at == noted is not None
    long_ago = timezone.now() - timedelta(minutes=2)
    rows.update(last_used_at=long_ago)
    post(api, "/v1/sandboxes", {"template": template.pk})
    assert rows.filter(last_used_at__gt=long_ago).exists()


def test_another_teams_template_is_not_there(
    other_api: Client, make_template: MakeTemplate
) -> None:
    refusal(other_api.get(f"{URL}/{make_template().pk}/usage"), 404, "not_found")
