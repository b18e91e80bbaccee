"""Who may open a live page's socket: a page of this console, at a name of this console."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import override_settings

from orkestr_console.ui.live import LivePage

OURS = {"ALLOWED_HOSTS": ["console.example", "[::1]"], "CSRF_TRUSTED_ORIGINS": []}


def opened_by(origin: str | None, host: str) -> LivePage:
    scope: Any = {"headers": [(b"host", host.encode())]}
    if origin is not None:
        scope["headers"].append((b"origin", origin.encode()))
    page = LivePage()
    page.scope = scope
    return page


def admitted(origin: str | None, host: str, *, https: bool = False) -> bool:
    page = opened_by(origin, host)
    with override_settings(**OURS, SESSION_COOKIE_SECURE=https):
        return page._same_origin()


@pytest.mark.parametrize(
    ("origin", "host", "https"),
    [
        ("http://console.example", "console.example", False),
        ("http://console.example:8000", "console.example:8000", False),
        ("http://[::1]:8000", "[::1]:8000", False),
        ("https://console.example", "console.example", True),
    ],
)
def test_pages_of_ours_may(origin: str, host: str, https: bool) -> None:
    assert admitted(origin, host, https=https)


@pytest.mark.parametrize(
    ("origin", "host", "https"),
    [
        (None, "console.example", False),
        ("", "console.example", False),
        ("null", "console.example", False),
        ("http://evil.example", "console.example", False),
        ("http://console.example.evil.example", "console.example", False),
        ("http://console.example:81", "console.example", False),
        ("http://user@console.example", "console.example", False),
        ("file://console.example", "console.example", False),
        ("console.example", "console.example", False),
        # A name of theirs that was rebound to our address: the two agree, and are not ours.
        ("http://evil.example", "evil.example", False),
        ("http://evil.example:8000", "evil.example:8000", False),
        # A page that came in the clear, where ours come by TLS.
        ("http://console.example", "console.example", True),
    ],
)
def test_no_other_page_may(origin: str | None, host: str, https: bool) -> None:
    assert not admitted(origin, host, https=https)


def test_the_address_of_the_operator_is_ours() -> None:
    page = opened_by("https://console.example", "inner:8000")
    with override_settings(CSRF_TRUSTED_ORIGINS=["https://console.example"]):
        assert page._same_origin()
