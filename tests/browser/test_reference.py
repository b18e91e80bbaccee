"""The API's reference, by keyboard alone and on a phone."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

pytestmark = [pytest.mark.live, pytest.mark.browser]


def test_a_call_is_found_and_its_examples_read_by_keyboard(page: Page) -> None:
    page.goto("/reference/")
    link = page.get_by_role("link", name="Run a command")
    link.focus()
    page.keyboard.press("Enter")
    call = page.get_by_role("region", name="Run a command", exact=True)
    expect(call).to_be_in_viewport()
    expect(call.get_by_text("curl -X POST")).to_be_visible()
    call.get_by_role("radio", name="curl").focus()
    page.keyboard.press("ArrowRight")
    expect(call.get_by_text("from orkestr import Sandbox")).to_be_visible()
    expect(call.get_by_text("curl -X POST")).to_be_hidden()
    call.get_by_text("The answer's fields").focus()
    page.keyboard.press("Enter")
    expect(call.get_by_role("rowheader", name="exit_code")).to_be_visible()

    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.goto("/reference/")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
