"""Approving a program's login in Chromium: on a phone, with the keyboard, in the dark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, ViewportSize

from tests.browser.conftest import Complaints
from tests.stack import Stack

PHONE: ViewportSize = {"width": 360, "height": 740}
DARK, LIGHT = "dark", "light"


class Login:
    """`orkestr login` of the official command line, as far as the link that it shows."""

    def __init__(self, stack: Stack, home: Path) -> None:
        self._program = Path(sys.executable).with_name("orkestr")
        self._environment = {"HOME": str(home), "PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
        self._settings = home / ".orkestr" / "config.json"
        self._settings.parent.mkdir()
        self._settings.write_text(json.dumps({"api_url": stack.url}))
        assert self("login", "--no-wait", "--no-browser").returncode == 0
        self.pending: dict[str, Any] = json.loads(self._settings.read_text())["pending_login"]

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._program, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def login(stack: Stack, tmp_path: Path) -> Login:
    return Login(stack, tmp_path)


@pytest.fixture(params=[LIGHT, DARK])
def phone(
    chromium: Browser, stack: Stack, complaints: Complaints, request: pytest.FixtureRequest
) -> Iterator[Page]:
    """A page on a small screen, not signed in."""
    context = chromium.new_context(
        base_url=stack.url, viewport=PHONE, color_scheme=request.param, has_touch=True
    )
    context.set_default_timeout(20_000)
    page = context.new_page()
    complaints.listen(page)
    yield page
    context.close()
    assert complaints.said == []


def sign_in(page: Page, stack: Stack) -> None:
    page.get_by_label("Email address").fill(stack.credentials.user)
    page.get_by_label("Password").fill(stack.credentials.password)
    page.get_by_role("button", name="Sign in").click()


def test_sign_in_compare_and_approve_on_a_phone(stack: Stack, phone: Page, login: Login) -> None:
    phone.goto(login.pending["url"])
    sign_in(phone, stack)
    code = phone.locator(".device-code")
    code.wait_for()
    assert code.inner_text().strip() == login.pending["user_code"]
    assert phone.get_by_text("Did you start this yourself, just now?").is_visible()
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    # The code stands out from what is behind it, in the light and in the dark.
    assert contrast(phone, ".device-code code") > 7
    phone.get_by_label("Look").check()
    phone.get_by_label("For how long").select_option("7")
    phone.get_by_role("button", name="Approve").click()
    phone.get_by_role("heading", name="Approved").wait_for()
    done = login("login")
    assert "Logged in as Demo Admin." in done.stdout
    assert "(scopes: sandboxes:read," in done.stdout
    phone.get_by_role("link", name="API tokens").click()
    phone.get_by_text("signed in with a browser").first.wait_for()
    assert login("logout").returncode == 0


def test_type_the_code_and_deny_with_the_keyboard(
    stack: Stack, fresh_page: Page, login: Login
) -> None:
    fresh_page.goto("/device/")
    sign_in(fresh_page, stack)
    # The field has the focus; letters come in any case, without the hyphen.
    fresh_page.get_by_label("Code", exact=True).wait_for()
    fresh_page.keyboard.type(login.pending["user_code"].lower().replace("-", ""))
    fresh_page.keyboard.press("Enter")
    fresh_page.locator(".device-code").wait_for()
    deny = fresh_page.get_by_role("button", name="Deny")
    for _ in range(30):
        fresh_page.keyboard.press("Tab")
        if deny.evaluate("button => button === document.activeElement"):
            break
    fresh_page.keyboard.press("Enter")
    fresh_page.get_by_role("heading", name="Denied").wait_for()
    assert "This login request was denied." in login("login").stderr


CONTRAST = """selector => {
    const element = document.querySelector(selector);
    const paint = colour => {
        const canvas = document.createElement("canvas").getContext("2d");
        for (const one of [].concat(colour)) {
            canvas.fillStyle = one;
            canvas.fillRect(0, 0, 1, 1);
        }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const behind = [];
    for (let at = element; at; at = at.parentElement) {
        behind.unshift(getComputedStyle(at).backgroundColor);
    }
    const luminance = rgb => rgb
        .map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
    const [text, ground] = [paint(getComputedStyle(element).color), paint(behind)].map(luminance);
    return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
}"""


def contrast(page: Page, selector: str) -> float:
    """The contrast of an element's text (WCAG 2.2, 1.4.3)."""
    return float(page.evaluate(CONTRAST, selector))
