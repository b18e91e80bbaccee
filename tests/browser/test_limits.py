"""An admin lowers the team's template limit; a member meets it, and is told whom to ask."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Complaints
from tests.stack import Stack

pytestmark = [pytest.mark.live, pytest.mark.browser]

MEMBER = ("member@demo.example", "a long enough passphrase 7")
REMOVE = "from orkestr_console.accounts.models import *; User.objects.get(email={0!r}).delete()"


@pytest.fixture
def member_page(page: Page, chromium: Browser, stack: Stack) -> Iterator[Page]:
    """Another browser, of somebody who took the admin's invitation."""
    page.goto("/team/people/")
    page.get_by_label("Email address").fill(MEMBER[0])
    page.get_by_role("button", name="Create invite link").click()
    link = page.locator("#invitation-link").inner_text()
    context = chromium.new_context(base_url=stack.url)
    theirs = context.new_page()
    theirs.goto(link)
    theirs.get_by_label("Your name").fill("Mem Ber")
    theirs.get_by_label("Password").fill(MEMBER[1])
    theirs.get_by_role("button", name="Join the team").click()
    try:
        expect(theirs.get_by_text("Welcome to Demo")).to_be_visible()
        yield theirs
    finally:
        context.close()
        assert stack.manage("shell", "-c", REMOVE.format(MEMBER[0])).returncode == 0


def set_template_limit(page: Page, typed: str) -> None:
    page.goto("/team/limits/")
    page.get_by_label("Templates", exact=True).fill(typed)
    page.get_by_role("button", name="Save limits").click()
    expect(page.get_by_text("Limits saved.")).to_be_visible()


def test_a_member_meets_the_limit_that_an_admin_has_lowered(
    page: Page, member_page: Page, complaints: Complaints
) -> None:
    set_template_limit(page, "0")
    try:
        member_page.get_by_role("link", name="New template").click()
        member_page.get_by_label("Name", exact=True).fill("too many")
        member_page.get_by_label("Recipe", exact=True).fill("true")
        member_page.get_by_role("button", name="Build template").click()
        banner = member_page.get_by_role("alert")
        expect(banner).to_contain_text(re.compile(r"0 templates that your team's admins allow"))
        expect(banner).to_contain_text("admin@demo.example")
        expect(member_page.get_by_label("Name", exact=True)).to_have_value("too many")
        member_page.goto("/team/limits/")
        expect(member_page.get_by_text("Only admins can change these")).to_be_visible()
        expect(member_page.get_by_role("button", name="Save limits")).to_have_count(0)
    finally:
        set_template_limit(page, "")
    member_page.goto("/templates/new/")
    expect(member_page.get_by_text("template slots are used")).to_have_count(0)


def test_a_member_who_is_removed_loses_the_page_they_look_at(page: Page, member_page: Page) -> None:
    page.goto("/team/people/")
    page.get_by_role("link", name="Remove Mem Ber").click()
    page.get_by_role("button", name="Remove").click()
    expect(page.get_by_text("Mem Ber was removed.")).to_be_visible()
    # Nobody reloads it: the socket was closed, and the page looked again.
    expect(member_page.get_by_text("You are in no team yet")).to_be_visible()


def test_more_than_the_plan_has_is_refused_at_its_field(page: Page, complaints: Complaints) -> None:
    page.goto("/team/limits/")
    page.get_by_label("Templates", exact=True).fill("16")
    page.get_by_role("button", name="Save limits").click()
    expect(page.locator("#max_templates-error")).to_contain_text("only an operator raises it")
    expect(page.get_by_label("Templates", exact=True)).to_have_value("16")
    complaints.allow("400 (Bad Request)")


def test_a_token_is_made_shown_once_and_revoked(page: Page) -> None:
    page.goto("/team/tokens/")
    page.get_by_label("Name", exact=True).fill("by hand")
    page.get_by_role("button", name="Create token").click()
    expect(page.locator("#new-token")).to_have_text(re.compile(r"^ork_\w{40,}$"))
    page.goto("/team/tokens/")
    expect(page.locator("#new-token")).to_have_count(0)
    page.get_by_role("button", name="Revoke by hand").click()
    expect(page.get_by_text("“by hand” was revoked")).to_be_visible()
    expect(page.get_by_role("row", name="by hand").first).to_contain_text("revoked")
