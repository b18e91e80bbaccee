"""``POST /v1/templates``."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.models import Plan, Team
from templates_app.api import MAX_TEMPLATE_BODY
from templates_app.models import BuildStep, Template
from tests.api.asking import post, refusal
from tests.conftest import MakeKey, api_client
from tests.fakes.fixtures import MakeTemplate, queued
from tests.fakes.host import FakeHost

URL = "/v1/templates"
GOOD = {"name": "data-stack", "base_template": "python-3.12", "recipe": ["pip install x", "true"]}


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != field}


def nothing_was_created() -> bool:
    return not Template.objects.exists() and not BuildStep.objects.exists() and queued() == []


def test_it_answers_at_once_that_it_is_building(api: Client, host: FakeHost, team: Team) -> None:
    answer = post(api, URL, GOOD)
    assert answer.status_code == 201
    said = answer.json()
    assert said["id"].startswith("tmpl_0")
    assert said["status"] == "building"
    assert said["name"] == "data-stack"
    assert said["base_template"] == "python-3.12"
    assert said["recipe"] == GOOD["recipe"]
    assert said["network"] == "restricted"
    assert said["created_at"].endswith("Z")
    assert said["error_message"] is None
    assert [(step["number"], step["status"]) for step in said["steps"]] == [
        (1, "pending"),
        (2, "pending"),
    ]
    assert queued() == ["templates_app.tasks.drive_builds"]
    assert host.built == {}, "the build is the worker's, not the request's"
    assert Template.objects.get().team == team


def test_the_network_can_be_open(api: Client, host: FakeHost) -> None:
    assert post(api, URL, {**GOOD, "network": "open"}).json()["network"] == "open"


def test_names_may_repeat_because_ids_identify(api: Client, host: FakeHost) -> None:
    ids = {post(api, URL, GOOD).json()["id"] for _ in range(2)}
    assert len(ids) == 2


def test_the_deprecated_alias_is_taken_and_means_debian(api: Client, host: FakeHost) -> None:
    said = post(api, URL, {**GOOD, "base_template": "ubuntu-24.04"}).json()
    assert said["base_template"] == "ubuntu-24.04"
    assert Template.objects.get().base_image == "debian-12"


def test_a_ready_template_of_the_team_is_a_base(api: Client, make_template: MakeTemplate) -> None:
    base = make_template()
    answer = post(api, URL, {**GOOD, "base_template": base.pk})
    assert answer.status_code == 201
    assert Template.objects.get(pk=answer.json()["id"]).base_image == base.image_id


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        (without("name"), "name", "required"),
        ({**GOOD, "name": None}, "name", "must be a string"),
        ({**GOOD, "name": 7}, "name", "must be a string"),
        ({**GOOD, "name": ""}, "name", "blank"),
        ({**GOOD, "name": "  \t "}, "name", "blank"),
        ({**GOOD, "name": "x" * 101}, "name", "at most 100"),
        ({**GOOD, "name": "a\nb"}, "name", "control"),
        ({**GOOD, "name": "a\x1b[31mb"}, "name", "control"),
        ({**GOOD, "name": "a\u202eb"}, "name", "control"),
        ({**GOOD, "name": "\u200b\u200b"}, "name", "control"),
        ({**GOOD, "name": "\u200d\u200d"}, "name", "blank"),
        ({**GOOD, "name": "a\0b"}, "name", "NUL"),
        (without("base_template"), "base_template", "required"),
        ({**GOOD, "base_template": ""}, "base_template", "required"),
        ({**GOOD, "base_template": ["debian-12"]}, "base_template", "must be a string"),
        ({**GOOD, "base_template": "windows-95"}, "base_template", "debian-12"),
        ({**GOOD, "base_template": "DEBIAN-12"}, "base_template", "debian-12"),
        ({**GOOD, "base_template": "../debian-12"}, "base_template", "debian-12"),
        ({**GOOD, "base_template": "x" * 10_000}, "base_template", "base image"),
        ({**GOOD, "base_template": "code-interpreter"}, "base_template", "debian-12"),
        ({**GOOD, "base_template": "tmpl_01ARZ3NDEKTSV4RRFFQ69G5FAV"}, "base_template", "check"),
        ({**GOOD, "base_template": "tmpl_nonsense"}, "base_template", "check"),
        (without("recipe"), "recipe", "required"),
        ({**GOOD, "recipe": []}, "recipe", "at least one step"),
        ({**GOOD, "recipe": None}, "recipe", "must be a list"),
        ({**GOOD, "recipe": "true"}, "recipe", "must be a list"),
        ({**GOOD, "recipe": {"0": "true"}}, "recipe", "must be a list"),
        ({**GOOD, "recipe": ["true"] * 101}, "recipe", "at most 100"),
        ({**GOOD, "recipe": ["true", 5]}, "recipe[1]", "must be a string"),
        ({**GOOD, "recipe": ["true", ["x"]]}, "recipe[1]", "must be a string"),
        ({**GOOD, "recipe": ["true", None]}, "recipe[1]", "must be a string"),
        ({**GOOD, "recipe": ["true", ""]}, "recipe[1]", "blank"),
        ({**GOOD, "recipe": ["true", " \n\t"]}, "recipe[1]", "blank"),
        ({**GOOD, "recipe": ["true", "x" * 262_145]}, "recipe[1]", "262,144"),
        ({**GOOD, "recipe": ["é" * 131_073]}, "recipe[0]", "262,144"),
        ({**GOOD, "recipe": ["x" * 262_144] * 4 + ["y"]}, "recipe", "1,048,576"),
        ({**GOOD, "recipe": ["echo a\0b"]}, "recipe[0]", "take out \\0, character 7"),
        ({**GOOD, "recipe": ["true\necho a\0"]}, "recipe[0]", "line 2, character 7"),
        ({**GOOD, "recipe": ["\u200b \u200b"]}, "recipe[0]", "(U+200B)"),
        ({**GOOD, "recipe": ["RUN apt-get update"]}, "recipe[0]", "without RUN"),
        ({**GOOD, "recipe": ["# syntax=docker\n\n  FROM debian"]}, "recipe[0]", "base_template"),
        ({**GOOD, "recipe": ["true", "ENV A=1"]}, "recipe[1]", "template's 'env'"),
        ({**GOOD, "recipe": ["COPY . /app"]}, "recipe[0]", "fetch it (git clone"),
        ({**GOOD, "recipe": ["ADD a.tar /"]}, "recipe[0]", "curl"),
        ({**GOOD, "recipe": ["WORKDIR\t/app"]}, "recipe[0]", "cd DIRECTORY"),
        ({**GOOD, "recipe": ['CMD ["true"]']}, "recipe[0]", "sandbox's exec"),
        ({**GOOD, "recipe": ["$ pip install x"]}, "recipe[0]", "prompt"),
        ({**GOOD, "network": "off"}, "network", "restricted"),
        ({**GOOD, "network": "OPEN"}, "network", "restricted"),
        ({**GOOD, "network": None}, "network", "restricted"),
        ({**GOOD, "env": ["A=b"]}, "env", "must be an object"),
        ({**GOOD, "env": {"A": 1}}, "env.A", "must be a string"),
        ({**GOOD, "env": {"A B": "x"}}, "env", "'A B' is not a valid variable name"),
        ({**GOOD, "env": {"A": "x" * 70_000}}, "env", "65,536"),
        ({**GOOD, "colour": "red"}, "colour", "not a known field"),
        ({**GOOD, "status": "ready"}, "status", "not a known field"),
        ({}, "name", "required"),
    ],
)
def test_bad_input_names_the_field_and_creates_nothing(
    api: Client, host: FakeHost, body: dict[str, Any], field: str, says: str
) -> None:
    said = refusal(post(api, URL, body), 400, "invalid_request")
    assert said["detail"].startswith(f"{field}: "), said
    assert says in said["detail"], said
    assert field in said["fields"]
    assert nothing_was_created()


@pytest.mark.parametrize("code_point", [0x41, 0xE9, 0x65E5, 0x1F9EA])
def test_names_and_steps_may_be_in_any_language(
    api: Client, host: FakeHost, code_point: int
) -> None:
    name = chr(code_point) * 100
    said = post(api, URL, {**GOOD, "name": name, "recipe": [f"echo {name}"]}).json()
    assert (said["name"], said["recipe"]) == (name, [f"echo {name}"])


def test_an_emoji_that_is_joined_of_several_is_a_fine_name(api: Client, host: FakeHost) -> None:
    assert post(api, URL, {**GOOD, "name": "lab 👩‍🔬"}).status_code == 201


def test_a_name_is_kept_without_the_spaces_around_it(api: Client, host: FakeHost) -> None:
    assert post(api, URL, {**GOOD, "name": "  tools \t"}).json()["name"] == "tools"


def test_the_largest_recipe_is_taken(api: Client, host: FakeHost) -> None:
    # Each character of these takes six of JSON's.
    recipe = ["x" + "\x01" * 262_143] * 4
    said = post(api, URL, {**GOOD, "recipe": recipe})
    assert said.status_code == 201
    assert said.json()["recipe"] == recipe


def test_a_step_is_kept_as_it_is(api: Client, host: FakeHost) -> None:
    step = "  cat <<'E'\n\ta \\ $b \"c\"\nE\n"
    assert post(api, URL, {**GOOD, "recipe": [step]}).json()["recipe"] == [step]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (
            "set -e\r\nif true; then\r\n  echo two\r\nfi\r\n",
            "set -e\nif true; then\n  echo two\nfi\n",
        ),
        # A file of Windows, split at its line feeds.
        ("pip install x\r", "pip install x"),
        ("printf 'a\rb'", "printf 'a\rb'"),
    ],
)
def test_lines_end_as_the_shell_wants_them(
    api: Client, host: FakeHost, sent: str, kept: str
) -> None:
    said = post(api, URL, {**GOOD, "recipe": [sent]}).json()
    assert said["recipe"] == [kept]
    assert said["steps"][0]["command"] == kept


@pytest.mark.parametrize(
    "step", ["RUN=1 true", "RUNNER x", "run x", "echo RUN x", "FROM", "$HOME/x", "true\nRUN x"]
)
def test_what_only_looks_like_another_tools_is_a_step(
    api: Client, host: FakeHost, step: str
) -> None:
    assert post(api, URL, {**GOOD, "recipe": [step]}).status_code == 201


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"B": "y" * 60_000}, "140,002 bytes altogether"),
        ({"A": "ü" * 30_000 + ":$A"}, "variable A would have 140,004 bytes"),
    ],
)
def test_an_environment_that_its_base_makes_too_large_is_refused(
    api: Client, make_template: MakeTemplate, own: dict[str, str], sentence: str
) -> None:
    base = make_template(env={})
    Template.objects.update(status="ready", contents={"env": {"A": "x" * 80_000}})
    before = Template.objects.count()
    answer = post(api, URL, {**GOOD, "base_template": base.pk, "env": own})
    error = refusal(answer, 400, "invalid_request")
    assert sentence in error["fields"]["env"]
    assert Template.objects.count() == before
    answer = post(api, URL, {**GOOD, "base_template": base.pk, "env": {"B": "y" * 50_000}})
    assert answer.status_code == 201


def test_what_is_baked_in_is_shown_with_what_is_inherited(
    api: Client, console: Client, make_template: MakeTemplate
) -> None:
    template = make_template(env={"OWN": "1", "PATH": "/own:$PATH"})
    at = f"{URL}/{template.pk}"
    assert api.get(at).json()["baked_env"] is None
    baked = {"OWN": "1", "PATH": "/own:/base:$PATH", "BASES": "<2>"}
    Template.objects.update(status="ready", contents={"env": baked})
    said = api.get(at).json()
    assert (said["env"], said["baked_env"]) == ({"OWN": "1", "PATH": "/own:$PATH"}, baked)
    page = console.get(f"/templates/{template.pk}/").content.decode()
    assert page.index("OWN=1") < page.index("from the base") < page.index("BASES=&lt;2&gt;")
    assert "PATH=/own:/base:$PATH" in page


def test_the_environment_is_kept_shown_and_built_with(
    api: Client, host: FakeHost, make_template: MakeTemplate
) -> None:
    env = {"PATH": "/opt/x/bin:$PATH", "_x": "ü=\n"}
    template = make_template(env=env)
    said = api.get(f"{URL}/{template.pk}").json()
    assert said["env"] == env
    assert host.built[template.image_id].request.env == env
    assert post(api, URL, GOOD).json()["env"] == {}


def test_a_body_that_is_no_json_is_malformed(api: Client, host: FakeHost) -> None:
    answer = api.post(URL, "{name:", content_type="application/json")
    refusal(answer, 400, "malformed_json")
    assert nothing_was_created()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_another_content_type_is_refused(api: Client, host: FakeHost, kind: str) -> None:
    said = refusal(api.post(URL, '{"name": "x"}', content_type=kind), 415, "unsupported_media_type")
    assert "application/json" in said["detail"]


def test_a_body_that_is_too_large_is_refused(api: Client, host: FakeHost) -> None:
    refusal(post(api, URL, {**GOOD, "name": "x" * MAX_TEMPLATE_BODY}), 413, "payload_too_large")


@pytest.mark.parametrize("status", ["building", "failed"])
def test_a_base_that_is_not_ready_is_a_conflict(
    api: Client, make_template: MakeTemplate, status: str
) -> None:
    base = make_template()
    Template.objects.filter(pk=base.pk).update(status=status)
    said = refusal(post(api, URL, {**GOOD, "base_template": base.pk}), 409, "template_not_ready")
    assert base.name in said["detail"]
    assert Template.objects.count() == 1


def test_another_teams_template_is_as_unknown_as_none_at_all(
    api: Client, other_api: Client, make_template: MakeTemplate
) -> None:
    base = make_template()
    theirs = refusal(
        post(other_api, URL, {**GOOD, "base_template": base.pk}), 400, "invalid_request"
    )
    Template.objects.all().delete()
    nobodys = refusal(
        post(other_api, URL, {**GOOD, "base_template": base.pk}), 400, "invalid_request"
    )
    assert theirs == nobodys


def test_an_image_of_the_host_is_no_base_by_its_own_id(
    api: Client, other_api: Client, make_template: MakeTemplate
) -> None:
    image = make_template().image_id
    for caller in (api, other_api):
        refusal(post(caller, URL, {**GOOD, "base_template": image}), 400, "invalid_request")


def test_a_base_that_is_still_being_made_can_be_tried_again(api: Client, host: FakeHost) -> None:
    host.base_states["python-3.12"] = "building"
    answer = post(api, URL, GOOD)
    said = refusal(answer, 503, "host_unavailable")
    assert "python-3.12" in said["detail"]
    assert int(answer.headers["Retry-After"]) > 0
    assert nothing_was_created()


def test_a_host_that_does_not_answer_is_said_to_be_away(api: Client, host: FakeHost) -> None:
    host.down = True
    answer = post(api, URL, GOOD)
    refusal(answer, 503, "host_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert nothing_was_created()


def test_the_plans_cap_says_the_limit_the_use_and_what_to_do(
    api: Client, host: FakeHost, team: Team
) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_templates=2)
    for _ in range(2):
        assert post(api, URL, GOOD).status_code == 201
    said = refusal(post(api, URL, GOOD), 403, "plan_limit")
    assert "2 of the 2" in said["detail"]
    assert "delete" in said["detail"]
    assert Template.objects.count() == 2


def test_failed_builds_do_not_count(api: Client, make_template: MakeTemplate, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_templates=1)
    template = make_template()
    refusal(post(api, URL, GOOD), 403, "plan_limit")
    Template.objects.filter(pk=template.pk).update(status="failed")
    assert post(api, URL, GOOD).status_code == 201


def test_a_free_team_is_told_that_templates_are_a_paid_feature(
    db: None, host: FakeHost, make_key: MakeKey
) -> None:
    free = Team.objects.create(name="Free", slug="free", plan_id="free")
    said = refusal(post(api_client(make_key(free)), URL, GOOD), 403, "plan_limit")
    assert "paid" in said["detail"]
    assert nothing_was_created()


def test_a_plan_without_the_open_network_says_so(api: Client, host: FakeHost, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(allow_open_network=False)
    said = refusal(post(api, URL, {**GOOD, "network": "open"}), 403, "plan_limit")
    assert "restricted" in said["detail"]
    assert nothing_was_created()


@pytest.mark.parametrize("method", ["put", "patch", "delete"])
def test_other_methods_are_refused_with_those_there_are(
    api: Client, host: FakeHost, method: str
) -> None:
    answer = getattr(api, method)(URL, GOOD, content_type="application/json")
    refusal(answer, 405, "method_not_allowed")
    assert {"GET", "POST"} <= set(answer.headers["Allow"].split(", "))
