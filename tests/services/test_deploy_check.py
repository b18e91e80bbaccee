"""Django's own list for a deployment, ``check --deploy``: nothing on it is left open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
# What is not done, and why, stands in settings.py where it is silenced.
HTTPS = {"axes.W002", "security.W005", "security.W008", "security.W021"}
HTTP = {"axes.W002", "security.W004", "security.W008", "security.W012", "security.W016"}
FACTS = """
from django.conf import settings as s
print(*sorted(s.SILENCED_SYSTEM_CHECKS))
print(s.SESSION_COOKIE_NAME, s.CSRF_COOKIE_NAME, s.SESSION_COOKIE_SECURE, s.CSRF_COOKIE_SECURE)
print(s.SECURE_HSTS_SECONDS, s.SECURE_PROXY_SSL_HEADER, s.DEBUG, s.CSRF_TRUSTED_ORIGINS)
"""


def manage(address: str, var: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    named = {"ORKESTR_PUBLIC_URL": address, "ORKESTR_VAR": str(var), "ORKESTR_DEBUG": ""}
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=TREE,
        env={**os.environ, **named, "PORT": "8123"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("address", "silenced", "facts"),
    [
        (
            "https://console.example",
            HTTPS,
            [
                "__Host-orkestr_session_8123 __Host-orkestr_csrf_8123 True True",
                "31536000 ('HTTP_X_FORWARDED_PROTO', 'https') False ['https://console.example']",
            ],
        ),
        (
            "http://console.example",
            HTTP,
            [
                "orkestr_session_8123 orkestr_csrf_8123 False False",
                "0 None False ['http://console.example']",
            ],
        ),
    ],
)
def test_a_deployment_has_nothing_open(
    tmp_path: Path, address: str, silenced: set[str], facts: list[str]
) -> None:
    done = manage(address, tmp_path, "check", "--deploy", "--fail-level", "DEBUG")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues ({len(silenced)} silenced)" in done.stdout
    shown = manage(address, tmp_path, "shell", "--no-imports", "-c", FACTS).stdout.splitlines()
    assert shown == [" ".join(sorted(silenced)), *facts]
