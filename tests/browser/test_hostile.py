"""In a real browser: hostile names and output are read, nothing runs, the policy is not needed.

No host agent and no installation: the real web process over rows that are as bad as can be. Its
browser is its own, because rows are written while it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import pytest
from django.conf import settings
from django.db import connection
from django.test import Client
from django.utils import timezone
from playwright.sync_api import Page, expect, sync_playwright

from orkestr_console.accounts.models import AuditEntry, Membership, Role, Team, User
from orkestr_console.accounts.services import mint_token
from sandboxes_app.models import Sandbox, SandboxStatus
from templates_app.events import notify_changed
from templates_app.models import BuildEvent, BuildStep, Template, TemplateStatus
from tests.browser.conftest import ARGUMENTS, CHROMIUM, Complaints
from tests.conftest import make_user
from tests.fakes.fixtures import plans as plans
from tests.serving import Serving
from tests.serving import serving as serving

pytestmark = [pytest.mark.browser, pytest.mark.django_db(transaction=True)]

RUNS = "<img src=x onerror=window.x55z=1><script>window.x55z=1</script>"
HOSTILE = f"\"'></textarea></title>{RUNS}"
TURNED = f"\u202e{HOSTILE}\u2066"
OUTPUT = f"\x1b[31m{TURNED}\x1b]8;;javascript:window.x55z=1\x07link\x1b]8;;\x07\x1b[0m\n"


@dataclass
class Scene:
    """What is there to be looked at, and the cookie of somebody who may."""

    cookie: str
    building: Template
    failed: Template
    box: Sandbox


@pytest.fixture
def scene(plans: None) -> Scene:
    """Rows as no form would make them: names that are refused today, too."""
    team = Team.objects.create(name=HOSTILE, slug="acme", plan_id="team")
    alice = make_user("alice", team, Role.OWNER)
    User.objects.update(name=HOSTILE[:100], is_staff=True)
    Membership.objects.create(
        user=make_user("bob", team, Role.MEMBER),
        team=Team.objects.create(name=HOSTILE, slug="b", plan_id="free"),
    )
    mint_token(team, HOSTILE, ["sandboxes:read"], created_by=alice)
    facts = {"team": team, "name": HOSTILE, "base_template": "debian-12", "recipe": [TURNED]}
    building, failed = (Template.objects.create(base_image="debian-12", **facts) for _ in range(2))
    for template in (building, failed):
        BuildStep.objects.create(template=template, number=1, command=TURNED, output=OUTPUT)
    Template.objects.filter(pk=failed.pk).update(
        status=TemplateStatus.FAILED, error_message=f"{TURNED}\n{OUTPUT}", refused_hosts=[HOSTILE]
    )
    box = Sandbox.objects.create(
        team=team,
        template="debian-12",
        template_name=HOSTILE,
        image_id="debian-12",
        status=SandboxStatus.RUNNING,
        network="restricted",
        size="small",
        cpu=1,
        memory_mb=1024,
        timeout_seconds=600,
        expires_at=timezone.now() + timedelta(hours=1),
        metadata={TURNED: TURNED},
        error_message=TURNED,
    )
    AuditEntry.objects.create(
        team_id=team.pk,
        who=TURNED,
        action="x",
        outcome="denied",
        detail=TURNED,
        object_name=TURNED,
        data={TURNED: TURNED},
    )
    browser = Client(headers={"User-Agent": HOSTILE})
    browser.force_login(alice)
    browser.get("/account/")
    return Scene(browser.cookies[settings.SESSION_COOKIE_NAME].value, building, failed, box)


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def opened(scene: Scene, serving: Serving, complaints: Complaints) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(base_url=serving.url)
        name = f"orkestr_session_{serving.port}"
        context.add_cookies([{"name": name, "value": scene.cookie, "url": serving.url}])
        context.set_default_timeout(20_000)
        page = context.new_page()
        complaints.listen(page)
        yield page
        browser.close()


def aside[T](work: Callable[[], T]) -> T:
    """Do it in another thread: this one has the browser's event loop, which Django refuses."""

    def alone() -> T:
        try:
            return work()
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(alone).result()


def quiet(page: Page, complaints: Complaints) -> None:
    assert page.evaluate("window.x55z") is None
    assert complaints.said == []


def test_nothing_hostile_runs_and_the_policy_has_nothing_to_report(
    opened: Page, scene: Scene, complaints: Complaints
) -> None:
    page = opened
    paths = [
        *("/templates/", "/sandboxes/", "/account/", "/teams/", "/operator/"),
        *("/team/people/", "/team/tokens/", "/team/audit/", "/team/limits/", "/team/usage/"),
        f"/templates/{scene.failed.pk}/",
        f"/templates/{scene.building.pk}/",
        f"/templates/{scene.failed.pk}/delete/",
        f"/templates/new/?from={scene.failed.pk}",
        f"/sandboxes/{scene.box.pk}/",
    ]
    for path in paths:
        page.goto(path, wait_until="networkidle")
        # Read by a person in the bar above every page, and in what the page is about.
        expect(page.locator(".team b")).to_have_text(HOSTILE)
        assert "\u202e" not in page.inner_text("main"), path
        quiet(page, complaints)
    assert page.locator("#sandbox-side dt").last.inner_text() == f"⟨U+202E⟩{HOSTILE}⟨U+2066⟩"


def test_what_comes_by_the_socket_does_not_run_either(
    opened: Page, scene: Scene, complaints: Complaints
) -> None:
    page, building = opened, scene.building
    page.goto(f"/templates/{building.pk}/")

    def print_more() -> None:
        now = {"kind": "output", "step": 1, "seq": 1, "at": timezone.now()}
        BuildEvent.objects.create(template=building, payload={"text": OUTPUT}, **now)
        Template.objects.filter(pk=building.pk).update(name=f"{HOSTILE}2")
        BuildStep.objects.filter(template=building).update(status="running")
        notify_changed(building.pk, building.team_id)

    aside(print_more)
    expect(page.locator("#template-head h1")).to_have_text(f"{HOSTILE}2")
    line = page.locator("#step-1 .log .lines")
    expect(line).to_have_text(f"U+202E{HOSTILE}U+2066link\n", use_inner_text=False)
    assert page.locator("#step-1 .log a[href^=javascript]").count() == 0
    assert page.locator("#step-1 .log .f1").count() >= 1
    quiet(page, complaints)


def test_were_it_not_escaped_the_policy_would_stop_it_and_say_so(
    opened: Page, complaints: Complaints
) -> None:
    """So that the silence above means something."""
    page = opened
    page.goto("/templates/", wait_until="networkidle")
    with page.expect_console_message(lambda said: "Content Security Policy" in said.text):
        page.evaluate(
            "text => document.querySelector('main').insertAdjacentHTML('beforeend', text)", RUNS
        )
    assert page.evaluate("window.x55z") is None
    complaints.allow("Content Security Policy")
