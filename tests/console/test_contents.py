"""The pages of what is in an image and of how two differ."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.actor import Actor
from templates_app import services
from templates_app.models import BuildEvent, Template, TemplateStatus
from templates_app.specs import TemplateSpec
from tests.console.markup import tight

HOSTILE = "<img src=x>\u202e\x1b[31m"


def text(answer: Any) -> str:
    return tight(answer)


def ready(actor: Actor, name: str, packages: dict[str, Any], **changes: Any) -> Template:
    """A ready template with these packages."""
    spec = TemplateSpec(name=name, base_template="debian-12", recipe=["one", "two"])
    template = services.create_template(actor, spec)
    told = {"digest": f"sha256:{name}", "packages": packages, "truncated": False}
    values = {"status": TemplateStatus.READY, "contents": told, "size_bytes": 2_000_000, **changes}
    Template.objects.filter(pk=template.pk).update(**values)
    template.steps.update(status="succeeded", added_bytes=1_000, added_files=3)
    return template


@pytest.fixture
def one(console_actor: Actor) -> Template:
    return ready(
        console_actor, "one", {"dpkg": [["bash", "5"], ["jq", "1.6"]], "pip": [[HOSTILE, HOSTILE]]}
    )


@pytest.fixture
def two(console_actor: Actor) -> Template:
    return ready(console_actor, "two", {"dpkg": [["bash", "5"], ["jq", "1.7"], ["new", "2"]]})


def test_the_page_lists_packages_and_what_steps_added(console: Client, one: Template) -> None:
    BuildEvent.objects.create(
        template=one,
        seq=90,
        kind="scrub",
        payload={"removed": [{"what": "package caches", "bytes": 5000, "files": 8}]},
        at=one.created_at,
    )
    page = text(console.get(f"/templates/{one.pk}/contents/"))
    assert 'data-text="jq 1.6"' in page
    assert "&lt;img src=x&gt;⟨U+202E⟩⟨U+001B⟩[31m" in page
    assert HOSTILE not in page
    assert "+1000" not in page
    assert "+1.00\u202fkB" in page
    assert "package caches" in page
    assert 'data-copy="sha256:one"' in page
    only = text(console.get(f"/templates/{one.pk}/contents/?manager=dpkg"))
    assert "jq" in only
    assert "img src" not in only
    assert "jq" in text(console.get(f"/templates/{one.pk}/contents/?manager=<b>"))


def test_a_template_without_an_image_says_why(console: Client, building: Template) -> None:
    answer = console.get(f"/templates/{building.pk}/contents/")
    assert answer.status_code == 409
    assert "is still building" in text(answer)


def test_an_old_template_says_that_it_was_not_recorded(console: Client, one: Template) -> None:
    Template.objects.update(contents=None)
    page = text(console.get(f"/templates/{one.pk}/contents/"))
    assert "built before packages were recorded" in page
    assert "not recorded" in page


def test_two_templates_are_compared(console: Client, one: Template, two: Template) -> None:
    Template.objects.filter(pk=two.pk).update(size_bytes=2_500_000)
    page = text(console.get("/templates/compare/", {"a": one.pk, "b": two.pk}))
    assert '<td class="mono">jq</td><td class="mono">1.6</td><td class="mono">1.7</td>' in page
    assert '<td class="mono">new</td><td><span class="quiet">—</span></td>' in page
    assert "bash" not in page
    assert "+500\u202fkB" in page
    assert HOSTILE not in page
    assert "Both are the same image" not in page
    same = text(console.get("/templates/compare/", {"a": one.pk, "b": one.pk}))
    assert "Both are the same image" in same


def test_steps_of_different_length_stand_side_by_side(
    console: Client, one: Template, two: Template
) -> None:
    two.steps.filter(number=2).delete()
    assert console.get("/templates/compare/", {"a": one.pk, "b": two.pk}).status_code == 200
    assert console.get("/templates/compare/", {"a": two.pk, "b": one.pk}).status_code == 200


def test_the_second_is_chosen_among_ready_ones(
    console: Client, one: Template, building: Template
) -> None:
    page = text(console.get("/templates/compare/", {"a": one.pk}))
    assert f'<option value="{one.pk}" selected>' in page
    assert building.pk not in page
    answer = console.get("/templates/compare/", {"a": one.pk, "b": building.pk})
    assert answer.status_code == 409
    assert "is still building" in text(answer)


def test_another_teams_image_is_not_there(
    console: Client, other_actor: Actor, other_console: Client, one: Template
) -> None:
    foreign = ready(other_actor, "foreign", {})
    for query in ({"a": one.pk, "b": foreign.pk}, {"a": foreign.pk, "b": one.pk}):
        answer = console.get("/templates/compare/", query)
        assert answer.status_code == 404
        assert "foreign" not in text(answer)
    assert other_console.get(f"/templates/{one.pk}/contents/").status_code == 404
    page = text(other_console.get("/templates/compare/"))
    assert one.pk not in page
    assert console.get("/templates/compare/?a=x&b=<b>").status_code == 404
