from __future__ import annotations

import time
from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Team
from orkestr_console.core.environment import (
    format_environment,
    parse_environment,
    unformattable_names,
)
from templates_app.forms import TemplateForm, parse_steps
from templates_app.models import Template, TemplateStatus
from tests.console.markup import tight
from tests.fakes.fixtures import queued
from tests.fakes.host import FakeHost

GOOD = {
    "name": "data-stack",
    "base_template": "python-3.12",
    "recipe": "# what we need\r\npip install pandas\r\n\r\necho done\r\n",
    "network": "restricted",
}


def text(answer: Any) -> str:
    return tight(answer)


def test_a_new_template_builds_the_steps_that_were_typed(console: Client) -> None:
    answer = console.post("/templates/new/", GOOD)
    template = Template.objects.get()
    assert answer["Location"] == f"/templates/{template.pk}/"
    assert template.recipe == ["pip install pandas", "echo done"]
    assert [step.command for step in template.steps.all()] == template.recipe
    assert queued() == ["templates_app.tasks.drive_builds"]


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"name": "  "}, "name", "The name must not be blank"),
        ({"name": "x" * 101}, "name", "at most 100 characters; this has 101"),
        ({"name": "a\0b"}, "name", "must not contain"),
        ({"recipe": "# nothing\n\n"}, "recipe", "needs at least one step"),
        ({"recipe": "true\n" * 101}, "recipe", "has 101 steps"),
        ({"recipe": "true\n# no\n" + "x" * 262_145}, "recipe", "Line 3 has 262,145 bytes"),
        ({"recipe": "true\na\0b"}, "recipe", "take out \\0, line 2, character 2"),
        ({"recipe": "true\n\nRUN true"}, "recipe", "Line 3 begins with RUN, as in a Dockerfile"),
        ({"network": "off"}, "network", "must be one of"),
        ({"base_template": "windows"}, "base_template", "is not a base image here"),
        ({"base_template": ""}, "base_template", "is required"),
        ({"base_template": "tmpl_x\0"}, "base_template", "must not contain NUL"),
    ],
)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_lost(
    console: Client, change: dict[str, str], field: str, sentence: str
) -> None:
    typed = {**GOOD, **change}
    answer = console.post("/templates/new/", typed)
    assert answer.status_code == 400
    assert sentence in answer.context["form"].errors[field]
    assert f'id="{field}-error"' in text(answer)
    form = answer.context["form"]
    assert form.recipe == typed["recipe"].replace("\r\n", "\n")
    assert (form.name, form.base_template) == (typed["name"], typed["base_template"])
    assert not Template.objects.exists()


def test_everything_wrong_is_said_at_once(console: Client) -> None:
    answer = console.post("/templates/new/", {**GOOD, "name": "", "recipe": ""})
    assert set(answer.context["form"].errors) == {"name", "recipe"}


def test_a_full_plan_is_said_before_and_after(console: Client, team: Team) -> None:
    team.plan.max_templates = 1
    team.plan.save()
    console.post("/templates/new/", GOOD)
    assert "All 1 template slots are used" in text(console.get("/templates/new/"))
    answer = console.post("/templates/new/", {**GOOD, "name": "another"})
    assert answer.status_code == 403
    assert "is using 1 of the 1 templates" in text(answer)
    assert 'value="another"' in text(answer)


def test_a_base_that_is_made_on_request_can_be_chosen(console: Client, host: FakeHost) -> None:
    host.base_states |= {"code-interpreter": "missing", "debian-12": "building"}
    host.on_request = {"code-interpreter"}
    page = text(console.get("/templates/new/"))
    offered = page.partition('value="code-interpreter"')[2].partition("</option>")[0]
    assert "made when it is first used" in offered
    assert "disabled" not in offered
    withheld = page.partition('value="debian-12"')[2].partition("</option>")[0]
    assert "disabled" in withheld
    chosen = text(console.get("/sandboxes/new/"))
    assert "made when it is first used" in chosen
    assert 'value="debian-12"' not in chosen


def test_the_form_stays_when_the_host_is_away(console: Client, host: FakeHost) -> None:
    host.down = True
    assert "isn't responding" in text(console.get("/templates/new/"))
    answer = console.post("/templates/new/", GOOD)
    assert answer.status_code == 503
    assert "pip install pandas" in text(answer)
    assert '<option value="python-3.12" selected>' in text(answer)


def test_a_continued_line_is_one_step() -> None:
    recipe = "apt-get update && \\\n  apt-get install jq\n# no\necho a # yes"
    steps = parse_steps(recipe)
    assert [(s.line, s.command) for s in steps] == [
        (1, "apt-get update && \\\n  apt-get install jq"),
        (4, "echo a # yes"),
    ]


SCRIPT = "#!/bin/bash\nset -e\n\nif true; then\n  echo a \\\n    b\nfi\n"


def test_a_script_that_is_pasted_whole_is_one_step(console: Client) -> None:
    console.post("/templates/new/", {**GOOD, "recipe": SCRIPT.replace("\n", "\r\n")})
    assert Template.objects.get().recipe == [SCRIPT]


def test_lines_between_backticks_are_one_step() -> None:
    recipe = f"true\n```bash\n{SCRIPT}```\necho `id`\n````\na\n```\nb\n````  \n```\nlast"
    steps = [(step.line, step.command) for step in parse_steps(recipe)]
    assert steps == [
        (1, "true"),
        (3, SCRIPT.removesuffix("\n")),
        (11, "echo `id`"),
        (13, "a\n```\nb"),
        (18, "last"),
    ]


def test_a_template_can_be_built_again_from_its_form(console: Client, building: Template) -> None:
    building.recipe = [
        "a && \\\nb",
        "two\nlines",
        "#no",
        "echo \\",
        "c",
        "x\n```\ny",
        "#!/bin/sh\nd",
        "e\u200b",
    ]
    form = TemplateForm.from_template(building)
    assert form.recipe.startswith("a && \\\nb\n```\ntwo\nlines\n```\n```\n#no\n```\n")
    assert [step.command for step in parse_steps(form.recipe)] == building.recipe[:-1]
    assert form.left_out == (8,)
    page = text(console.get(f"/templates/new/?from={building.pk}"))
    assert "pip install pandas\necho done" in page


def test_the_list_teaches_and_then_lists(console: Client, console_actor: Actor) -> None:
    assert "Build your first template" in text(console.get("/templates/"))
    console.post("/templates/new/", {**GOOD, "name": "<b>bold</b>"})
    page = text(console.get("/templates/"))
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert 'data-status="building"' in page
    assert "1 of 15 template slots used" in page


def test_a_failed_build_shows_its_tail_and_what_never_ran(
    console: Client, building: Template
) -> None:
    building.steps.filter(number=1).update(status="failed", exit_code=3, output="\x1b[31mno\x1b[0m")
    building.steps.filter(number=2).update(status="skipped")
    Template.objects.update(
        status=TemplateStatus.FAILED, error_message="Step 1 of 2 failed.\n<tail>"
    )
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "<b>Step 1 of 2 failed.</b>" in page
    assert "&lt;tail&gt;" in page
    assert '<span class="f1">no</span>' in page
    assert "exit 3" in page
    assert "Not run, because" in page
    assert f"/templates/new/?from={building.pk}" in page
    whole = console.get(f"/templates/{building.pk}/steps/1/output/")
    assert whole["Content-Type"] == "text/plain; charset=utf-8"
    assert text(whole) == "\x1b[31mno\x1b[0m"
    assert console.get(f"/templates/{building.pk}/steps/9/output/").status_code == 404


def test_a_ready_template_says_how_to_use_it(console: Client, building: Template) -> None:
    Template.objects.update(status=TemplateStatus.READY, size_bytes=1_240_000_000, build_ms=4200)
    page = text(console.get(f"/templates/{building.pk}/"))
    assert f"/sandboxes/new/?template={building.pk}" in page
    assert "http://testserver/v1/sandboxes" in page
    assert "1.24\u202fGB" in page


def test_a_steps_warning_is_at_the_step_and_on_the_ready_page(
    console: Client, building: Template, host: FakeHost
) -> None:
    building.steps.filter(number=2).update(warnings=["This step left <b>/workspace/app</b>."])
    Template.objects.update(status=TemplateStatus.READY)
    page = text(console.get(f"/templates/{building.pk}/"))
    assert "<b>Step 2 has a warning</b>" in page
    said = '<div class="step-warnings" id="step-2-warnings"><p>'
    assert "This step left &lt;b&gt;/workspace/app" in page.partition(said)[2]


def test_variables_are_typed_kept_shown_and_built_again(console: Client) -> None:
    typed = "PATH=/opt/x/bin:$PATH\r\n# no\r\n\r\nAPP=a=b\r\n"
    console.post("/templates/new/", {**GOOD, "env": typed})
    template = Template.objects.get()
    assert template.env == {"PATH": "/opt/x/bin:$PATH", "APP": "a=b"}
    assert "APP=a=b</small>" in text(console.get(f"/templates/{template.pk}/"))
    template.env["KEY"] = "two\nlines"
    template.save()
    form = TemplateForm.from_template(template)
    assert (form.env, form.left_out_env) == ("APP=a=b\nPATH=/opt/x/bin:$PATH", ("KEY",))
    page = text(console.get(f"/templates/new/?from={template.pk}"))
    assert "The variable KEY can't be shown" in page
    console.post(f"/templates/{template.pk}/again/")
    assert Template.objects.order_by("created_at").last().env == template.env  # type: ignore[union-attr]


def test_of_many_variables_and_hosts_a_page_names_some(console: Client, host: FakeHost) -> None:
    console.post("/templates/new/", {**GOOD, "env": "\n".join(f"V{n}=<{n}>" for n in range(1200))})
    template = Template.objects.get()
    hosts = [f"h{number}.example" for number in range(40)]
    template.steps.filter(number=1).update(refused_hosts=hosts)
    Template.objects.update(status=TemplateStatus.READY, refused_hosts=hosts)
    page = text(console.get(f"/templates/{template.pk}/"))
    assert "V39=&lt;39&gt;</small><small>and 1,160 more</small>" in page
    assert "V40=" not in page
    assert "h3.example, h4.example and 35 more</code> but continued" in page
    assert "h4.example and 35 more and rebuild</a>" in page


def test_thousands_of_variables_are_typed_at_once() -> None:
    env = {f"v{number}": "" for number in range(9000)} | {"KEY": "two\nlines"}
    began = time.process_time()
    assert parse_environment(format_environment(env)) == {name: "" for name in env if name != "KEY"}
    assert unformattable_names(env) == ("KEY",)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("env", "sentence"),
    [("A=1\nnonsense", "Line 2 is not of the form"), ("1A=1", "is not a valid variable name")],
)
def test_a_variable_that_is_none_is_said_at_its_field(
    console: Client, env: str, sentence: str
) -> None:
    answer = console.post("/templates/new/", {**GOOD, "env": env})
    assert answer.status_code == 400
    assert sentence in answer.context["form"].errors["env"]
    assert 'id="env-error"' in text(answer)


def test_deleting_asks_first(console: Client, building: Template) -> None:
    assert "Delete “data-stack”?" in text(console.get(f"/templates/{building.pk}/delete/"))
    assert Template.objects.exists()
    answer = console.post(f"/templates/{building.pk}/delete/", follow=True)
    assert not Template.objects.exists()
    assert "“data-stack” was deleted" in text(answer)


def test_another_teams_template_is_not_there(other_console: Client, building: Template) -> None:
    for tail in ("", "delete/", "steps/1/output/"):
        foreign = other_console.get(f"/templates/{building.pk}/{tail}")
        assert foreign.status_code == 404
        assert "data-stack" not in text(foreign)
    assert other_console.post(f"/templates/{building.pk}/delete/").status_code == 404
    assert other_console.get(f"/templates/new/?from={building.pk}").status_code == 404
    assert building.name not in text(other_console.get("/templates/"))
    assert Template.objects.exists()


def test_odd_addresses_are_no_server_errors(console: Client) -> None:
    assert console.get("/templates/nonsense/").status_code == 404
    assert console.get("/templates/?cursor=nonsense").status_code == 400
    assert console.post("/templates/").status_code == 405
    assert console.get("/templates/new/?preset=nonsense&base=<b>").status_code == 200
