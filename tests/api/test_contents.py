"""``GET /v1/templates/{id}/contents``: what is in an image, and how two differ."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from templates_app.models import Template
from tests.api.asking import post, refusal
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.host import FakeHost

URL = "/v1/templates"


def filled(template: Template, digest: str, **packages: list[list[str]]) -> str:
    """Have the host have told these contents of a template; its id."""
    told = {"digest": digest, "packages": packages, "truncated": False}
    Template.objects.filter(pk=template.pk).update(contents=told)
    return template.pk


@pytest.fixture
def pair(make_template: MakeTemplate) -> tuple[str, str]:
    """Two templates: b has a newer pandas, no jq, and one step more."""
    first, second = make_template(recipe=["one"]), make_template(recipe=["one", "two"])
    first.steps.update(added_bytes=100, added_files=2)
    a = filled(first, "sha256:a", dpkg=[["jq", "1.6"], ["tar", "1.34"]], pip=[["pandas", "2.2.0"]])
    b = filled(second, "sha256:b", dpkg=[["tar", "1.34"]], pip=[["pandas", "2.2.3"]])
    return a, b


def contents(api: Client, template: str, **query: str) -> dict[str, Any]:
    answer = api.get(f"{URL}/{template}/contents", query)
    assert answer.status_code == 200, answer.content
    said: dict[str, Any] = answer.json()
    return said


def test_it_says_what_is_installed_and_what_each_step_added(
    api: Client, pair: tuple[str, str]
) -> None:
    said = contents(api, pair[0])
    assert (said["digest"], said["size_bytes"], said["file_count"]) == ("sha256:a", 5_000, 42)
    assert said["packages"]["dpkg"][0] == {"name": "jq", "version": "1.6"}
    assert said["packages"]["pip"] == [{"name": "pandas", "version": "2.2.0"}]
    assert said["steps"] == [
        {"number": 1, "command": "one", "added_bytes": 100, "added_files": 2, "cached": False}
    ]
    assert sum(gone["bytes"] for gone in said["scrub_removed"]) == 10


def test_two_are_compared(api: Client, pair: tuple[str, str]) -> None:
    a, b = pair
    said = contents(api, a, compare=b)
    assert (said["a"], said["b"], said["same_image"]) == (a, b, False)
    assert said["packages"]["dpkg"] == {
        "only_in_a": [{"name": "jq", "version": "1.6"}],
        "only_in_b": [],
        "changed": [],
        "same": 1,
    }
    assert said["packages"]["pip"]["changed"] == [{"name": "pandas", "a": "2.2.0", "b": "2.2.3"}]
    assert [(step["same_command"], step["a"] is None) for step in said["steps"]] == [
        (True, False),
        (False, True),
    ]
    back = contents(api, b, compare=a)
    assert back["packages"]["dpkg"]["only_in_b"] == said["packages"]["dpkg"]["only_in_a"]
    assert contents(api, a, compare=a)["same_image"] is True


def test_what_is_not_ready_has_no_contents(api: Client, host: FakeHost) -> None:
    body = {"name": "x", "base_template": "debian-12", "recipe": ["true"]}
    created = post(api, URL, body).json()["id"]
    refusal(api.get(f"{URL}/{created}/contents"), 409, "template_not_ready")


def test_another_teams_is_as_unknown_as_none(
    api: Client, other_api: Client, pair: tuple[str, str], make_template: MakeTemplate
) -> None:
    refusal(other_api.get(f"{URL}/{pair[0]}/contents"), 404, "not_found")
    for other in ("nonsense", "tmpl_01JAAAAAAAAAAAAAAAAAAAAAAA"):
        refusal(api.get(f"{URL}/{pair[0]}/contents", {"compare": other}), 404, "not_found")
