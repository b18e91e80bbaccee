"""What is in an image, and how two differ."""

from __future__ import annotations

from typing import Any

import pytest

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Conflict, NotFound
from templates_app.models import BuildEvent, Template, TemplateStatus
from templates_app.services.contents import (
    Contents,
    Package,
    Removed,
    StepSize,
    Versions,
    compare,
    compare_packages,
    contents,
)
from tests.fakes.fixtures import MakeTemplate
from tests.fakes.fixtures import host as host
from tests.fakes.fixtures import make_template as make_template

TOLD = {
    "digest": "sha256:0a",
    "packages": {"npm": [], "pip": [["pandas", "2.2"]], "dpkg": [["bash", "5"], ["jq", "1.6"]]},
    "truncated": True,
}


def with_contents(template: Template, told: Any) -> Template:
    Template.objects.filter(pk=template.pk).update(contents=told)
    return template


def test_contents_are_what_the_host_told(actor: Actor, make_template: MakeTemplate) -> None:
    template = with_contents(make_template(recipe=["one", "two"]), TOLD)
    template.steps.filter(number=1).update(added_bytes=-5, added_files=2)
    template.steps.filter(number=2).update(status="cached", added_bytes=None, added_files=None)
    rules = [{"what": "logs", "bytes": 1, "files": 3}, {"what": "caches", "bytes": 9, "files": 1}]
    BuildEvent.objects.filter(template=template, kind="scrub").update(payload={"removed": rules})
    found = contents(actor, template.pk)
    assert found.digest == "sha256:0a"
    assert list(found.packages) == ["dpkg", "pip"]
    assert found.packages["dpkg"] == (Package("bash", "5"), Package("jq", "1.6"))
    assert (found.count, found.truncated, found.removed_bytes) == (3, True, 10)
    assert found.steps == (
        StepSize(1, "one", -5, 2, cached=False),
        StepSize(2, "two", None, None, cached=True),
    )
    assert found.removed == (Removed("caches", 9, 1), Removed("logs", 1, 3))


def test_a_build_from_before_told_less(actor: Actor, make_template: MakeTemplate) -> None:
    template = with_contents(make_template(), None)
    BuildEvent.objects.filter(template=template, kind="scrub").update(payload={"removed_bytes": 7})
    found = contents(actor, template.pk)
    assert (found.digest, found.count, found.removed_bytes) == (None, 0, 7)
    BuildEvent.objects.filter(template=template, kind="scrub").delete()
    assert contents(actor, template.pk).removed == ()


@pytest.mark.parametrize("status", [TemplateStatus.BUILDING, TemplateStatus.FAILED])
def test_without_an_image_there_is_nothing_to_see(
    actor: Actor, make_template: MakeTemplate, status: str
) -> None:
    template = make_template()
    Template.objects.filter(pk=template.pk).update(status=status)
    with pytest.raises(Conflict, match="has no image"):
        contents(actor, template.pk)


def test_another_teams_contents_are_not_there(
    other_actor: Actor, make_template: MakeTemplate
) -> None:
    with pytest.raises(NotFound):
        contents(other_actor, make_template().pk)


def test_packages_differ_by_name_and_by_version() -> None:
    a = [Package("bash", "5"), Package("jq", "1.6"), Package("old", "1"), Package("two", "1")]
    b = [Package("bash", "5"), Package("jq", "1.7"), Package("new", "2"), Package("two", "1")]
    found = compare_packages("dpkg", a, [*b, Package("two", "2")])
    assert found.only_a == (Package("old", "1"),)
    assert found.only_b == (Package("new", "2"),)
    assert found.changed == (
        Versions("jq", ("1.6",), ("1.7",)),
        Versions("two", ("1",), ("1", "2")),
    )
    assert (found.same, found.count) == (1, 4)


def made(**changes: Any) -> Contents:
    template = Template(size_bytes=10, file_count=None, shared_bytes=4)
    plain: dict[str, Any] = {
        "digest": None,
        "packages": {},
        "truncated": False,
        "steps": (),
        "removed": (),
    }
    return Contents(template=template, **{**plain, **changes})


def test_sizes_and_steps_stand_side_by_side() -> None:
    first, second = (StepSize(n, f"step {n}", 1, 1, cached=False) for n in (1, 2))
    a = made(steps=(first, second), packages={"npm": (Package("tsx", "4"),)}, digest="x")
    b = made(steps=(first,), packages={"pip": (Package("httpx", "1"),)}, digest="y")
    b.template.size_bytes = 25
    found = compare(a, b)
    assert [(size.name, size.change) for size in found.sizes] == [
        ("size_bytes", 15),
        ("file_count", None),
        ("shared_bytes", 0),
    ]
    assert [(step.number, step.same_command) for step in found.steps] == [(1, True), (2, False)]
    assert found.steps[1].b is None
    assert [difference.manager for difference in found.packages] == ["npm", "pip"]
    assert not found.same_image


def test_two_unknown_digests_are_not_the_same_image() -> None:
    assert not compare(made(), made()).same_image
    assert compare(made(digest="x"), made(digest="x")).same_image
