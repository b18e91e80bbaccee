"""What doctor says of the port and the domain of previews."""

from __future__ import annotations

import socket

import pytest

from orkestr_console.runner.doctor import network
from orkestr_console.runner.layout import layout_from
from tests.stack import free_port

BASE, CONSOLE = "ORKESTR_PREVIEW_BASE", "ORKESTR_PUBLIC_URL"


@pytest.mark.parametrize(
    ("base", "console", "verdict", "part"),
    [
        ("", "", "ok", "localhost"),
        ("", "https://console.example.com", "warn", "browsers on other machines"),
        ("previews.example.net", "https://console.example.com", "ok", "https://<port>-<sandbox>"),
        ("p.example.com", "https://console.example.com", "warn", "the console's own domain"),
        ("http://p.example.net:8001", "https://console.example.com", "warn", "without TLS"),
    ],
)
def test_a_domain_that_is_too_near_or_out_of_reach_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, base: str, console: str, verdict: str, part: str
) -> None:
    monkeypatch.delenv(CONSOLE, raising=False)
    if console:
        monkeypatch.setenv(CONSOLE, console)
    port = str(free_port())
    given = {"ORKESTR_PREVIEW_PORT": port, BASE: base, "ORKESTR_VAR": "/nowhere"}
    finding = network.check_previews(layout_from(given))
    assert finding.verdict == verdict
    assert part in finding.detail and port in finding.detail


def test_a_taken_port_is_said_and_none_is_fine() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = {"ORKESTR_PREVIEW_PORT": str(server.getsockname()[1]), "ORKESTR_VAR": "/nowhere"}
        finding = network.check_previews(layout_from(given))
    assert finding.verdict == "fail" and "ORKESTR_PREVIEW_PORT" in finding.remedy
    finding = network.check_previews(layout_from({"ORKESTR_PREVIEW_PORT": "off"}))
    assert (finding.verdict, finding.detail[:3]) == ("ok", "off")
