"""Real Chromium in front of the live installation. Anything it complains of fails the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.stack import Stack
from tests.stack import stack as stack

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass
class Complaints:
    """What the page's console said; ``allow`` takes one that the test means to cause."""

    said: list[str] = field(default_factory=list)

    def listen(self, page: Page) -> None:
        """Hear console errors (violations of the policy among them) and uncaught exceptions."""
        page.on("console", self.hear_message)
        page.on("pageerror", lambda error: self.said.append(f"uncaught: {error}"))

    def hear_message(self, message: ConsoleMessage) -> None:
        """Keep a message with the page and the resource that it is about."""
        page = message.page.url if message.page else ""
        about = message.location["url"]
        self.hear(f"{message.type}: {message.text} ({about}) at {page}", message.type)

    def hear(self, text: str, kind: str) -> None:
        """Keep what is worse than a note."""
        if kind in {"error", "warning"}:
            self.said.append(text)

    def allow(self, part: str) -> None:
        """Forget the complaints that have ``part`` in them; there must be one."""
        kept = [text for text in self.said if part not in text]
        assert len(kept) < len(self.said), f"no complaint has {part!r}: {self.said}"
        self.said = kept


@pytest.fixture(scope="session")
def chromium(stack: Stack) -> Iterator[Browser]:

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def complaints() -> Complaints:
    return Complaints()


@pytest.fixture
def fresh_page(chromium: Browser, stack: Stack, complaints: Complaints) -> Iterator[Page]:
    """A page of a new browser profile, not signed in."""
    context = chromium.new_context(base_url=stack.url, viewport={"width": 1280, "height": 900})
    context.set_default_timeout(20_000)
    page = context.new_page()
    complaints.listen(page)
    yield page
    context.close()
    assert complaints.said == []


@pytest.fixture
def page(fresh_page: Page, stack: Stack) -> Page:
    """Signed in as the demo team's admin."""
    sign_in(fresh_page, stack)
    return fresh_page


def sign_in(page: Page, stack: Stack) -> None:
    """Through the form, as a person does."""
    page.goto("/")
    page.get_by_label("Email address").fill(stack.credentials.user)
    page.get_by_label("Password").fill(stack.credentials.password)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_role("heading", name="Templates").wait_for()
