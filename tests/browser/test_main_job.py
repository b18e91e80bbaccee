"""The main job by hand and eye: from a recipe to a command in a sandbox, without a reload."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints, sign_in
from tests.stack import Stack

pytestmark = [pytest.mark.live, pytest.mark.browser]

BUILD_MS = 120_000


def new_template(page: Page, name: str, recipe: str, base: str = "debian-12") -> None:
    page.get_by_role("link", name="New template").click()
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("Base image").select_option(base)
    page.get_by_label("Recipe", exact=True).fill(recipe)
    page.get_by_role("button", name="Build template").click()
    page.get_by_role("heading", name=name).wait_for()


def badge(page: Page, kind: str, status: str, timeout: float = 20_000) -> None:
    expect(page.locator(f"#{kind}-badge")).to_have_attribute("data-status", status, timeout=timeout)


def delete(page: Page) -> None:
    page.get_by_role("link", name="Delete").click()
    # The dialog asks what would come back; once the template is deleted there is no answer.
    for use in page.get_by_role("dialog").locator(".delete-use").all():
        expect(use.locator("#template-use")).to_be_visible()
    page.get_by_role("button", name="Delete template").click()
    page.get_by_role("heading", name="Templates").wait_for()


def run(page: Page, command: str, text: str) -> None:
    box = page.get_by_label("Command", exact=True)
    box.fill(command)
    box.press("Enter")
    expect(page.locator(".entry").last).to_contain_text(text)
    expect(box).to_have_value("")


def test_from_a_recipe_to_a_command(page: Page) -> None:
    recipe = "# two steps\necho first; sleep 2; echo \x1b[32msecond\x1b[0m\ntouch /root/made-here"
    new_template(page, "by-hand", recipe.replace("\x1b", r"$'\e'").replace("[", r"'['"))
    # A mark that a reload would wipe off.
    page.evaluate("window.neverReloaded = true")
    badge(page, "template", "building")
    expect(page.locator("#step-1 .log")).to_contain_text("first")
    expect(page.locator("#step-1 .log")).to_contain_text("second", timeout=BUILD_MS)
    expect(page.locator("#step-1 .log .f2")).to_have_text("second")
    badge(page, "template", "ready", BUILD_MS)
    expect(page.locator("#step-2-line")).to_have_attribute("data-state", "succeeded")
    expect(page.locator("#template-side")).to_contain_text(re.compile(r"Size.*[kMG]B"))
    expect(page.locator("#step-1 .log .lines")).to_have_text("first\nsecond\n")
    assert page.evaluate("window.neverReloaded") is True

    page.get_by_role("link", name="Start a sandbox").click()
    expect(page.get_by_label("Start from")).to_have_value(re.compile("^tmpl_"))
    page.get_by_role("button", name="Start sandbox").click()
    badge(page, "sandbox", "running")
    page.evaluate("window.neverReloaded = true")
    run(page, "ls /root/", "made-here")
    run(page, "echo out; echo err >&2; exit 3", "exit 3")
    expect(page.locator(".entry").last.locator(".log.out")).to_have_text("out\n")
    expect(page.locator(".entry").last.locator(".log.err")).to_contain_text("err")
    page.get_by_label("Command", exact=True).press("ArrowUp")
    expect(page.get_by_label("Command", exact=True)).to_have_value(re.compile("exit 3$"))
    assert page.evaluate("window.neverReloaded") is True

    page.get_by_role("button", name="Pause").click()
    badge(page, "sandbox", "paused")
    expect(page.locator("#run")).to_be_disabled()
    page.get_by_role("button", name="Resume").click()
    badge(page, "sandbox", "running")
    run(page, "ls /root/", "made-here")

    page.get_by_role("link", name="Terminate").click()
    page.get_by_role("button", name="Terminate").click()
    badge(page, "sandbox", "terminated")
    page.get_by_role("link", name="Templates").first.click()
    page.get_by_role("link", name="by-hand").first.click()
    delete(page)
    expect(page.get_by_text("“by-hand” was deleted")).to_be_visible()


def test_a_failing_step_shows_its_output(page: Page) -> None:
    new_template(page, "breaks", "echo fine\necho the reason >&2; exit 7\necho never")
    badge(page, "template", "failed", BUILD_MS)
    expect(page.locator("#template-banner")).to_contain_text("Step 2 of 3")
    expect(page.locator("#template-banner .log")).to_contain_text("the reason")
    expect(page.locator("#step-2")).to_have_attribute("open", "")
    expect(page.locator("#step-2 .log")).to_contain_text("the reason")
    expect(page.locator("#step-2-line")).to_contain_text("exit 7")
    expect(page.locator("#step-3-line")).to_contain_text("skipped")
    page.reload()
    expect(page.locator("#step-2 .log")).to_contain_text("the reason")
    page.get_by_role("link", name="Edit and rebuild").click()
    expect(page.get_by_label("Recipe", exact=True)).to_have_value(re.compile("exit 7"))
    page.go_back()
    delete(page)


def test_the_list_follows_a_build_made_elsewhere(page: Page, stack: Stack) -> None:
    page.evaluate("window.neverReloaded = true")
    body = {"name": "elsewhere", "base_template": "debian-12", "recipe": ["sleep 1"]}
    with stack.client() as api:
        template = api.post("/v1/templates", json=body).json()["id"]
        row = page.locator(f"#row-{template} .badge")
        expect(row).to_have_attribute("data-status", "building")
        expect(row).to_have_attribute("data-status", "ready", timeout=BUILD_MS)
        api.delete(f"/v1/templates/{template}")
        expect(page.locator(f"#row-{template}")).to_have_count(0)
    assert page.evaluate("window.neverReloaded") is True


def test_a_page_finds_its_way_back_after_a_restart(
    page: Page, stack: Stack, complaints: Complaints
) -> None:
    """The web process dies while a build runs: the page reconnects and misses nothing."""
    new_template(page, "survives", "for i in $(seq 1 60); do echo tick $i; sleep 0.2; done")
    expect(page.locator("#step-1 .log")).to_contain_text("tick 3")
    page.evaluate("window.neverReloaded = true")
    old = stack.pid("web")
    stack.kill("web")
    stack.wait_until_restarted("web", old)
    badge(page, "template", "ready", BUILD_MS)
    lines = page.locator("#step-1 .log .lines").text_content() or ""
    assert lines.split("\n")[:-1] == [f"tick {n}" for n in range(1, 61)]
    assert page.evaluate("window.neverReloaded") is True
    if complaints.said:
        complaints.allow("WebSocket connection to")
    delete(page)


def test_wrong_input_is_said_in_the_form(page: Page, complaints: Complaints) -> None:
    page.get_by_role("link", name="New template").click()
    page.get_by_label("Recipe", exact=True).fill("# nothing\n")
    page.get_by_role("button", name="Build template").click()
    expect(page.locator("#name-error")).to_contain_text("must not be blank")
    expect(page.locator("#recipe-error")).to_contain_text("at least one step")
    expect(page.get_by_label("Name", exact=True)).to_be_focused()
    expect(page.get_by_label("Recipe", exact=True)).to_have_value("# nothing\n")
    complaints.allow("400 (Bad Request)")


def test_everything_can_be_reached_by_keyboard(fresh_page: Page, stack: Stack) -> None:
    page = fresh_page
    sign_in(page, stack)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.keyboard.press("n")
    expect(page.get_by_label("Name", exact=True)).to_be_focused()
    page.keyboard.type("by keys")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Base image")).to_be_focused()
    page.get_by_label("Base image").select_option("debian-12")
    for _ in range(5):  # four examples, then the recipe
        page.keyboard.press("Tab")
    expect(page.get_by_label("Recipe", exact=True)).to_be_focused()
    page.keyboard.type("true\n# remark\n\nfalse || true")
    expect(page.get_by_text("2 steps")).to_be_visible()
    expect(page.locator(".recipe-gutter")).to_have_text("1\n\n\n2")
    recipe = page.get_by_label("Recipe", exact=True)
    recipe.fill("a\n```\n#!/bin/sh\n\nb \\\n```\nc")
    expect(page.locator(".recipe-gutter")).to_have_text("1\n\n2\n\n\n\n3")
    recipe.fill("#!/bin/sh\na\nb")
    expect(page.locator("[data-step-count]")).to_have_text("1 step")
    recipe.fill("true\n# remark\n\nfalse || true")
    page.keyboard.press("Control+Enter")
    badge(page, "template", "ready", BUILD_MS)
    page.get_by_role("link", name="Delete").focus()
    answered = re.compile("/sandboxes/of-template/")
    with page.expect_response(answered):
        page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("link", name="Delete")).to_be_focused()
    with page.expect_response(answered):
        page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab") if page.get_by_role("link", name="Cancel").is_hidden() else None
    expect(page.get_by_role("button", name="Delete template")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Templates").wait_for()


def test_the_theme_is_kept(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Account menu")).click()
    page.get_by_role("button", name="Dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    dark = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.get_by_role("button", name=re.compile("Account menu")).click()
    page.get_by_role("button", name="Light").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != dark


def test_no_page_is_wider_than_a_small_phone(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    team = ("people", "limits", "usage", "tokens", "audit")
    paths = ("/templates/", "/templates/new/", "/sandboxes/", "/sandboxes/new/", "/account/")
    for path in (*paths, "/teams/", "/connect/", *(f"/team/{name}/" for name in team)):
        page.goto(path)
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{path} is {wide} px too wide"


def test_signing_out_ends_it(page: Page) -> None:
    page.get_by_role("button", name=re.compile("Account menu")).click()
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.goto("/templates/")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
