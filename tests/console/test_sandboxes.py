from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from hostruntime.errors import ExecTimeout
from hostruntime.wire.commands import ExecResult
from orkestr_console.accounts.models import Team
from sandboxes_app.models import Sandbox
from templates_app.models import Template, TemplateStatus
from tests.console.markup import tight
from tests.fakes.host import FakeHost

GOOD = {"template": "debian-12", "size": "small", "network": "off", "timeout_seconds": "600"}
HTMX = {"HX-Request": "true"}


def text(answer: Any) -> str:
    return tight(answer)


def test_booting_leads_to_the_sandbox(console: Client, host: FakeHost) -> None:
    answer = console.post("/sandboxes/new/", {**GOOD, "env": "# mine\nA=1\nB=x=y\n"})
    sandbox = Sandbox.objects.get()
    assert answer["Location"] == f"/sandboxes/{sandbox.pk}/"
    assert sandbox.env == {"A": "1", "B": "x=y"}
    assert sandbox.is_running
    assert 'data-status="running"' in text(console.get(answer["Location"]))


def test_the_picker_offers_what_is_ready(console: Client, building: Template) -> None:
    page = text(console.get("/sandboxes/new/"))
    assert '<optgroup label="Built-in">' in page
    assert building.pk not in page
    Template.objects.update(status=TemplateStatus.READY)
    page = text(console.get(f"/sandboxes/new/?template={building.pk}"))
    assert '<optgroup label="Your templates">' in page
    assert f'<option value="{building.pk}" selected>' in page


@pytest.mark.parametrize(
    ("change", "field", "sentence"),
    [
        ({"template": ""}, "template", "Choose what to start from"),
        ({"template": "windows"}, "template", "is not a base image here"),
        ({"template": "a\0"}, "template", "must not contain NUL"),
        ({"size": "huge"}, "size", "must be one of"),
        ({"network": "lan"}, "network", "must be one of"),
        ({"timeout_seconds": "soon"}, "timeout_seconds", "must be a whole number"),
        ({"timeout_seconds": "1"}, "timeout_seconds", "must be at least 10"),
        ({"env": "A=1\nnonsense"}, "env", "Line 2 is not of the form"),
        ({"env": "1A=1"}, "env", "is not a valid variable name"),
    ],
)
def test_what_is_wrong_is_said_at_its_field(
    console: Client, change: dict[str, str], field: str, sentence: str
) -> None:
    answer = console.post("/sandboxes/new/", {**GOOD, **change})
    assert answer.status_code == 400
    assert sentence in answer.context["form"].errors[field]
    assert f'id="{field}-error"' in text(answer)
    assert not Sandbox.objects.exists()


def test_a_template_that_still_builds_cannot_be_booted(console: Client, building: Template) -> None:
    answer = console.post("/sandboxes/new/", {**GOOD, "template": building.pk})
    assert answer.status_code == 409
    assert "is still building" in answer.context["form"].errors["template"]


def test_another_teams_template_is_unknown(other_console: Client, building: Template) -> None:
    answer = other_console.post("/sandboxes/new/", {**GOOD, "template": building.pk})
    assert answer.status_code == 404
    assert "template" in answer.context["form"].errors


def test_a_full_plan_is_said(console: Client, team: Team) -> None:
    team.plan.max_concurrent_sandboxes = 0
    team.plan.save()
    answer = console.post("/sandboxes/new/", GOOD)
    assert answer.status_code == 403
    assert "is using 0 of the 0 concurrent sandboxes" in text(answer)


def test_a_command_is_answered_with_its_streams_apart(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    host.answers["make"] = ExecResult(2, None, b"out <b>\n", b"\x1b[31merr\x1b[0m\n", 1234)
    answer = console.post(
        f"/sandboxes/{sandbox.pk}/exec/", {"command": "make", "cwd": "/srv"}, headers=HTMX
    )
    page = text(answer)
    assert answer.status_code == 200
    assert "<html" not in page
    assert "out &lt;b&gt;" in page
    assert '<span class="f1">err</span>' in page
    assert "exit 2" in page
    assert "1.2\u202fs" in page
    assert host.ran[-1].cwd == "/srv"


def test_a_command_without_a_script_answers_with_the_page(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    host.answers["true"] = ExecResult(0, None, b"", b"", 3)
    page = text(console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": "true"}))
    assert "<html" in page
    assert "no output" in page


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ({"command": "  "}, "The command is blank"),
        ({"command": "x", "cwd": "here"}, "must be an absolute path"),
        ({"command": "x", "timeout_seconds": "0"}, "must be at least 1"),
        ({"command": "x", "timeout_seconds": "long"}, "must be a whole number"),
        ({"command": "a\0b"}, "must not contain NUL"),
    ],
)
def test_a_command_that_is_refused_says_why_and_is_kept(
    console: Client, sandbox: Sandbox, typed: dict[str, str], sentence: str
) -> None:
    answer = console.post(f"/sandboxes/{sandbox.pk}/exec/", typed, headers=HTMX)
    assert "data-failed" in text(answer)
    assert sentence in text(answer)
    page = console.post(f"/sandboxes/{sandbox.pk}/exec/", typed)
    assert page.context["form"].command == typed["command"]


def test_a_command_over_its_time_shows_what_it_printed(
    console: Client, sandbox: Sandbox, host: FakeHost
) -> None:
    host.answers["sleep 9"] = ExecTimeout("The command ran past 1 s.", stdout=b"half\n")
    page = text(
        console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": "sleep 9"}, headers=HTMX)
    )
    assert "half" in page
    assert "data-failed" in page


def test_terminating_asks_first_and_keeps_the_history(console: Client, sandbox: Sandbox) -> None:
    assert "Terminate this sandbox?" in text(console.get(f"/sandboxes/{sandbox.pk}/terminate/"))
    page = text(console.post(f"/sandboxes/{sandbox.pk}/terminate/", follow=True))
    assert 'data-status="terminated"' in page
    assert "was terminated" in page
    answer = console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": "x"}, headers=HTMX)
    assert "is terminated, not running" in text(answer)


def test_the_list_can_be_narrowed(console: Client, sandbox: Sandbox) -> None:
    assert sandbox.pk in text(console.get("/sandboxes/?status=running"))
    page = text(console.get("/sandboxes/?status=terminated"))
    assert sandbox.pk not in page
    assert "No sandbox is terminated right now" in page
    assert console.get("/sandboxes/?status=nonsense").status_code == 400


def test_the_empty_list_teaches(console: Client) -> None:
    assert "Start your first sandbox" in text(console.get("/sandboxes/"))


def test_another_teams_sandbox_is_not_there(other_console: Client, sandbox: Sandbox) -> None:
    assert other_console.get(f"/sandboxes/{sandbox.pk}/").status_code == 404
    assert other_console.post(f"/sandboxes/{sandbox.pk}/terminate/").status_code == 404
    foreign = other_console.post(f"/sandboxes/{sandbox.pk}/exec/", {"command": "x"}, headers=HTMX)
    assert foreign.status_code == 404
    assert sandbox.pk not in text(other_console.get("/sandboxes/"))
    sandbox.refresh_from_db()
    assert sandbox.is_running
