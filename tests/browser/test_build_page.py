"""The page of a build in a real browser: a noisy log, search, links to lines, cancel and retry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect

from tests.browser.test_main_job import BUILD_MS, badge, delete
from tests.stack import Stack

pytestmark = [pytest.mark.live, pytest.mark.browser]

COLOURED = r"echo -e '\033[32mgreen\033[0m done'"
NOISE = (
    r"seq 1 100000 | sed -e 's/.*7$/\x1b[33m&\x1b[0m/' -e 's/^4321$/& needle in it/'; " + COLOURED
)
# The longest stretch that the page did not answer in, noted while it is open.
WATCH = """() => {
  window.neverReloaded = true;
  window.longest = 0;
  new PerformanceObserver((list) => {
    for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
  }).observe({ entryTypes: ["longtask"] });
}"""
AT_END = "log => log.scrollHeight - log.scrollTop - log.clientHeight < 40"
# Where the log stands once a scroll has come to rest: ten frames later it is still there.
AT_REST = """log => new Promise((done) => {
  let place = NaN, frames = 0;
  const look = () => {
    frames = log.scrollTop === place ? frames + 1 : 0;
    place = log.scrollTop;
    if (frames < 10) requestAnimationFrame(look);
    else done(place);
  };
  look();
})"""
LAST_SHOWN = "log => Number(log.querySelector('.lines:not(.window)').lastElementChild.dataset.n)"


@contextmanager
def built(stack: Stack, name: str, *recipe: str) -> Iterator[str]:
    """A template that is asked for over REST and deleted in the end; its id."""
    body = {"name": name, "base_template": "debian-12", "recipe": list(recipe)}
    with stack.client() as api:
        answer = api.post("/v1/templates", json=body)
        assert answer.status_code == 201, answer.text
        template: str = answer.json()["id"]
        try:
            yield template
        finally:
            api.delete(f"/v1/templates/{template}")


def reach(page: Page, template: str, tail: str = "") -> None:
    """Open the page anew, so that an address with only another fragment is a load too."""
    page.goto("about:blank")
    page.goto(f"/templates/{template}/{tail}")


def test_a_noisy_build_is_readable_throughout(
    page: Page, stack: Stack, record_property: Callable[[str, object], None]
) -> None:
    with built(stack, "noisy", NOISE, "echo after", "sleep 1") as template:
        reach(page, template)
        page.evaluate(WATCH)
        badge(page, "template", "ready", BUILD_MS)
        assert page.evaluate("window.neverReloaded") is True
        record_property("longest_task_ms", page.evaluate("window.longest"))
        log = page.locator("#step-1 .log")
        page.locator("#step-1 summary").click()
        expect(log).to_be_visible()
        expect(log.locator(".tail, .lines > span").get_by_text("green")).to_be_visible()
        expect(log.locator(".lines:not(.window) .f3").first).to_be_visible()
        # Only the end is there, and the rest is offered.
        assert log.locator("[data-n]").count() <= 2002
        assert log.evaluate(LAST_SHOWN) == 100_001
        earlier = int(log.locator(".gap").get_attribute("data-last") or 0)
        assert earlier > 90_000
        log.get_by_role("link", name="Show earlier lines").click()
        expect(log.locator(f'[data-n="{earlier}"]')).to_be_attached()
        expect(log.locator(".gap").first).to_have_attribute("data-last", str(earlier - 1000))
        numbers = log.locator(".lines > span").evaluate_all("all => all.map(e => +e.dataset.n)")
        assert numbers == list(range(earlier - 999, 100_002))


def test_search_goes_from_hit_to_hit(page: Page, stack: Stack) -> None:
    with built(stack, "searched", NOISE, "echo another needle; exit 4") as template:
        reach(page, template)
        badge(page, "template", "failed", BUILD_MS)
        page.keyboard.press("/")
        field = page.get_by_label("Search the output of all steps")
        expect(field).to_be_focused()
        page.keyboard.type("NEEDLE")
        expect(page.locator("[data-found-count]")).to_have_text("2 lines")
        page.keyboard.press("Enter")
        target = page.locator(".log .target")
        expect(target).to_have_text("4321 needle in it\n")
        expect(target).to_be_in_viewport()
        assert page.url.endswith("#step-1-L4321")
        expect(page.locator("[data-found-count]")).to_have_text("1 of 2 lines")
        page.keyboard.press("Enter")
        expect(target).to_have_text("another needle\n")
        page.keyboard.press("Shift+Enter")
        expect(target).to_have_text("4321 needle in it\n")
        field.fill("nowhere to be found")
        expect(page.locator("[data-found]")).to_contain_text("No line contains")
        field.press("Escape")
        expect(page.locator("[data-found]")).to_be_hidden()


def test_a_link_to_a_line_finds_it(page: Page, stack: Stack) -> None:
    with built(stack, "linked", NOISE) as template:
        reach(page, template)
        badge(page, "template", "ready", BUILD_MS)
        target = page.locator(".log .target")
        reach(page, template, "#step-1-L54320")
        expect(target).to_have_text("54320\n")
        expect(target).to_be_in_viewport()
        # Later lines of the same stretch, and back up by a click on a number.
        page.locator('.log [data-n="54322"]').click(position={"x": 20, "y": 5})
        expect(target).to_have_text("54322\n")
        assert page.url.endswith("#step-1-L54322")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy link to line").click()
        copied = "() => navigator.clipboard.readText()"
        assert page.evaluate(copied) == page.url
        button = page.get_by_role("button", name="Copy the output of step 1")
        button.click()
        expect(page.locator("#step-1 [data-copy-url][data-copied]")).to_be_visible()
        lines = str(page.evaluate(copied)).splitlines()
        assert lines[:3] == ["1", "2", "3"]
        assert lines[-1] == "green done"
        with page.expect_download() as download:
            page.get_by_role("link", name="Download the whole log").click()
        whole = download.value.path().read_text()
        assert "\n99999\n100000\ngreen done\n" in whole
        assert "\x1b" not in whole
        # The server makes the same page for who has no script.
        reach(page, template, "?line=1-777")
        expect(page.locator('#step-1 .log [data-n="777"]')).to_have_text("777\n")
        # Folded away and back.
        page.locator("#step-1 summary").click()
        expect(page.locator("#step-1 .log")).to_be_hidden()


def test_following_stops_for_a_reader(page: Page, stack: Stack) -> None:
    step = "for i in $(seq 1 4000); do echo tick $i; sleep 0.02; done"
    with built(stack, "followed", step) as template:
        reach(page, template)
        log = page.locator("#step-1 .log")
        expect(log).to_contain_text("tick 60\n")
        assert log.evaluate(AT_END)
        button = page.locator("#step-1 [data-follow]")
        expect(button).to_have_text("Pause")
        expect(page.locator("#step-1-line time[data-since]")).to_have_text(
            re.compile(r"\d+\u202fs")
        )
        # Scrolling up pauses: what is read stays where it is, and what comes is counted.
        log.hover()
        page.mouse.wheel(0, -200)
        expect(button).to_have_text(re.compile(r"Follow \(\d+ new lines\)"))
        place = log.evaluate(AT_REST)
        shown = log.evaluate(LAST_SHOWN)
        heard = int(re.sub(r"\D", "", button.inner_text()))
        page.wait_for_function(
            "([button, heard]) => Number(button.textContent.replace(/\\D/g, '')) >= heard + 10",
            arg=[button.element_handle(), heard],
        )
        assert log.evaluate("log => log.scrollTop") == place
        assert log.evaluate(LAST_SHOWN) == shown
        button.click()
        expect(button).to_have_text("Pause")
        assert log.evaluate(AT_END)
        numbers = log.locator(".lines > span").evaluate_all("all => all.map(e => +e.dataset.n)")
        assert numbers == list(range(1, len(numbers) + 1))
        cancel(page)


def cancel(page: Page) -> None:
    page.get_by_role("link", name="Cancel build").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("stopped immediately")
    dialog.get_by_role("button", name="Cancel build").click()
    badge(page, "template", "failed")
    expect(page.locator("#template-banner")).to_contain_text("cancelled by")


def test_cancel_then_retry_from_the_failed_step(page: Page, stack: Stack) -> None:
    with built(stack, "cancelled", "echo made > /root/made", "sleep 300") as template:
        reach(page, template)
        expect(page.locator("#step-2-line")).to_have_attribute(
            "data-state", "running", timeout=BUILD_MS
        )
        cancel(page)
        expect(page.locator("#step-1-line")).to_have_attribute("data-state", "succeeded")
        page.get_by_role("button", name="Retry from the failed step").click()
        expect(page).not_to_have_url(re.compile(template))
        expect(page.locator("#template-side")).to_contain_text("completed steps of failed builds")
        first = page.locator("#step-1-line")
        expect(first).to_have_attribute("data-state", "cached", timeout=BUILD_MS)
        expect(first).to_contain_text("CACHED")
        expect(page.locator("#step-2-line")).to_have_attribute("data-state", "running")
        page.locator("#step-1 summary").click()
        expect(page.locator("#step-1-quiet").get_by_role("link")).to_have_attribute(
            "href", f"/templates/{template}/#step-1"
        )
        delete(page)


def test_deleting_says_what_runs_from_it(page: Page, stack: Stack) -> None:
    with built(stack, "in-use", "head -c 3000000 /dev/urandom > /root/blob") as template:
        reach(page, template)
        badge(page, "template", "ready", BUILD_MS)
        with stack.client() as api:
            box = api.post("/v1/sandboxes", json={"template": template}).json()["id"]
            page.get_by_role("link", name="Delete").click()
            dialog = page.get_by_role("dialog")
            expect(dialog).to_contain_text("1 sandbox")
            expect(dialog).to_contain_text(re.compile(r"Frees\s*\d+\.\d+\u202fMB"))
            dialog.get_by_role("link", name="Cancel").click()
            api.delete(f"/v1/sandboxes/{box}")
        page.get_by_role("link", name="Delete").click()
        expect(dialog).to_contain_text("no sandbox")
        dialog.get_by_role("button", name="Delete template").click()
        page.get_by_role("heading", name="Templates").wait_for()


def test_contents_and_comparison(page: Page, stack: Stack) -> None:
    with (
        built(stack, "first-image", "echo 1 > /root/one") as first,
        built(stack, "second-image", "dpkg --purge --force-all netbase nano || true") as second,
    ):
        for template in (second, first):
            reach(page, template)
            badge(page, "template", "ready", BUILD_MS)
        page.get_by_role("link", name="Contents").click()
        find = page.get_by_label("Find a package")
        find.fill("bash")
        expect(page.locator("#package-rows tr:visible").first).to_contain_text("bash")
        expect(page.locator("#package-rows tr", has_text="coreutils")).to_be_hidden()
        page.get_by_label("With").select_option(second)
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("heading", name="Steps")).to_be_visible()
        expect(page.get_by_label("First")).to_have_value(first)
