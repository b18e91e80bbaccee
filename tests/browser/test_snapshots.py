"""A snapshot by hand: taken of a sandbox, found, started from, and deleted."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints
from tests.browser.test_main_job import run

pytestmark = [pytest.mark.live, pytest.mark.browser]

# Nothing can be asked of a page that is being left; so what it says then is kept.
NOTE_WHAT_IS_SAID = """() => addEventListener("submit", (event) => sessionStorage.setItem(
    "said", getComputedStyle(event.target.querySelector(".pending")).display))"""


def test_a_snapshot_from_one_sandbox_to_the_next(page: Page, complaints: Complaints) -> None:
    page.goto("/sandboxes/new/?template=debian-12")
    page.get_by_role("button", name="Start sandbox").click()
    run(page, "echo kept > /workspace/file; cat /workspace/file", "kept")
    source = page.url
    page.get_by_role("link", name="Take a snapshot").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("by hand")
    expect(dialog.get_by_text("Taking the snapshot…")).to_be_hidden()
    page.evaluate(NOTE_WHAT_IS_SAID)
    dialog.get_by_role("button", name="Take snapshot").click()
    expect(page.get_by_role("heading", name="by hand")).to_be_visible()
    expect(page.locator("#snapshot .badge").first).to_have_text("Ready")
    assert page.evaluate("sessionStorage.getItem('said')") == "block"
    page.get_by_role("link", name="Snapshots").click()
    page.get_by_role("row").filter(has_text="by hand").get_by_role("link", name="by hand").click()
    page.get_by_role("button", name="Start sandbox").click()
    run(page, "cat /workspace/file", "kept")
    assert page.url != source
    end(page)
    page.goto(source)
    end(page)
    page.goto("/sandboxes/snapshots/")
    page.get_by_role("link", name="by hand").click()
    page.get_by_role("link", name="Delete").click()
    expect(page.get_by_role("main")).to_contain_text("permanently deleted")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("main")).to_contain_text("The snapshot by hand was deleted")


def end(page: Page) -> None:
    page.get_by_role("link", name="Terminate").click()
    page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
    expect(page.locator("#sandbox-banner")).to_contain_text("has ended")
