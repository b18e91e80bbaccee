"""A webhook from its creation to its deletion, in the browser."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from tests.receiving import Receiver, receiving

pytestmark = [pytest.mark.live, pytest.mark.browser]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def fits(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_made_tested_and_deleted_by_keyboard(page: Page, receiver: Receiver, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto("/team/webhooks/")
    page.get_by_label("Address").fill(receiver.url)
    page.get_by_label("Address").press("Enter")
    secret = page.locator("#new-secret")
    expect(secret).to_have_text(re.compile(r"^whsec_[0-9a-f]{64}$"))
    key = secret.inner_text()
    expect(page.get_by_role("button", name="Copy the secret")).to_be_visible()
    page.set_viewport_size({"width": 360, "height": 740})
    assert fits(page)
    page.get_by_role("link", name="Send a test").click()
    expect(secret).to_have_count(0)
    page.get_by_role("button", name="Send a test").focus()
    page.keyboard.press("Enter")
    # The list comes to it by itself.
    expect(page.get_by_role("row", name="webhook.test")).to_contain_text("Delivered")
    (got,) = receiver.wait_for(1)
    assert got.is_signed_with(key)
    assert fits(page)
    page.get_by_role("link", name="Delete").click()
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("The webhook was deleted.")).to_be_visible()
    expect(page.get_by_text(receiver.url)).to_have_count(0)
