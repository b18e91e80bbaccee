"""A volume by hand: named at a sandbox's start, seen, refused while in use, and deleted."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints
from tests.browser.test_main_job import run

pytestmark = [pytest.mark.live, pytest.mark.browser]


def test_a_volume_from_its_first_sandbox_to_its_end(page: Page, complaints: Complaints) -> None:
    page.goto("/sandboxes/new/?template=debian-12")
    page.get_by_text("Volume", exact=True).first.click()
    page.get_by_label("Volume", exact=True).fill("by hand")
    page.get_by_role("button", name="Start sandbox").click()
    expect(page.locator("#volume-error, .field-error").first).to_contain_text("letters")
    complaints.allow("400 (Bad Request)")
    page.get_by_label("Volume", exact=True).fill("by-hand")
    page.get_by_role("button", name="Start sandbox").click()
    expect(page.locator("#sandbox-side")).to_contain_text("by-hand")
    run(page, "echo kept > /persist/file; cat /persist/file", "kept")
    sandbox = page.url
    page.get_by_role("link", name="by-hand").click()
    row = page.get_by_role("row").filter(has_text="by-hand")
    expect(row).to_contain_text("10,240 MB")
    page.get_by_role("link", name="Delete by-hand").click()
    expect(page.get_by_role("main")).to_contain_text("All files on it are permanently deleted")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("alert")).to_contain_text("terminate that first")
    complaints.allow("409 (Conflict)")
    page.goto(sandbox)
    page.get_by_role("link", name="Terminate").click()
    expect(page.get_by_role("dialog")).to_contain_text("What is on its volume by-hand")
    page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
    expect(page.locator("#sandbox-banner")).to_contain_text("What is on its volume stays")
    page.goto("/sandboxes/volumes/")
    page.get_by_role("link", name="Delete by-hand").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("main")).to_contain_text("The volume was deleted")
