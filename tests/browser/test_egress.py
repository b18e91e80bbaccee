"""What was refused, in the browser: which host, from which step, and what to do."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Complaints
from tests.browser.test_main_job import BUILD_MS, badge, delete, new_template, run

pytestmark = [pytest.mark.live, pytest.mark.browser]

# Refused by name before anybody resolves it: no packet leaves for it.
UNLISTED = "downloads-of-a-name-that-is-long.nowhere-to-be-found.invalid"
FETCH = f"python3 -c \"import urllib.request as u; u.urlopen('https://{UNLISTED}/x')\""


def test_a_refused_build_names_the_host_and_offers_to_allow_it(page: Page) -> None:
    new_template(page, "refused", f"true\n{FETCH}", base="python-3.12-bare")
    badge(page, "template", "failed", BUILD_MS)
    banner = page.locator("#template-banner")
    expect(banner).to_contain_text("Step 2 of 2 failed")
    expect(banner).to_contain_text(f"The network policy blocked {UNLISTED} during the build")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    failed = page.url
    page.get_by_role("link", name=f"Allow {UNLISTED} and rebuild").click()
    expect(page.get_by_label("Recipe", exact=True)).to_have_value(f"true\n{FETCH}")
    expect(page.get_by_label("Additional allowed hosts")).to_have_value(UNLISTED)
    page.get_by_role("button", name="Build template").click()
    page.wait_for_url(re.compile(r"/templates/tmpl_\w+/$"))
    # The host is let through now, and does not exist: another sentence.
    badge(page, "template", "failed", BUILD_MS)
    expect(page.locator("#template-banner")).not_to_contain_text("network policy blocked")
    delete(page)
    page.goto(failed)
    delete(page)


def test_a_sandbox_lists_what_it_asked_for(page: Page) -> None:
    page.goto("/sandboxes/new/")
    page.get_by_label("Start from").select_option("python-3.12-bare")
    page.get_by_label("Restricted").check()
    page.get_by_role("button", name="Start sandbox").click()
    badge(page, "sandbox", "running")
    run(page, FETCH, "403")
    page.locator("#egress").get_by_role("link", name="Refresh").click()
    row = page.locator("#egress").get_by_role("row", name=UNLISTED)
    expect(row).to_contain_text("Refused")
    expect(row).to_contain_text("allow_domains")
    page.get_by_role("link", name="Terminate").click()
    page.get_by_role("button", name="Terminate").click()
    badge(page, "sandbox", "terminated")


def test_garbage_among_the_hosts_is_said_at_its_field(page: Page, complaints: Complaints) -> None:
    page.goto("/templates/new/")
    page.get_by_label("Name", exact=True).fill("garbage")
    page.get_by_label("Recipe", exact=True).fill("true")
    page.get_by_text("Additional allowed hosts").first.click()
    page.get_by_label("Additional allowed hosts").fill("10.0.0.1")
    page.get_by_role("button", name="Build template").click()
    expect(page.locator("#allow_domains-error")).to_contain_text("is an address")
    expect(page.get_by_label("Additional allowed hosts")).to_have_value("10.0.0.1")
    complaints.allow("400 (Bad Request)")
