"""A systemd unit: starts the console at boot, and restarts it when it exits (systemd.service(5)).

`manage.py up` restarts everything else in an installation; only the machine's own service manager
can restart that process itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from orkestr_console.runner.layout import Layout

UNIT = """\
[Unit]
Description=Orkestr Console at {url}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
WorkingDirectory={tree}
{environment}
EnvironmentFile=-{secrets}
ExecStart={python} {manage} up --no-self-check
Restart=always
RestartSec=5
# It stops its programs itself, in order. Sandboxes are in a unit of their own, and run on.
KillMode=mixed
TimeoutStopSec=180
OOMPolicy=continue
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
"""
# Where an operator puts secrets: others on the machine can read a unit.
SECRETS_FILE = "/etc/orkestr.env"
SECRETS = ("DATABASE_URL", "ORKESTR_SECRET_KEY", "ORKESTR_TOKEN_PEPPER")
# Variables of a manual start.
EXCLUDED = frozenset({"ORKESTR_PYTHON"})


def configured_secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The names of what is configured now, and left out of the unit."""
    return [name for name in SECRETS if environment.get(name)]


def unit(layout: Layout, environment: Mapping[str, str] = os.environ) -> str:
    """The unit's text, with what the environment configures now."""
    given = {
        name: value
        for name, value in sorted(environment.items())
        if value and (name == "PORT" or name.startswith("ORKESTR_"))
        if name not in EXCLUDED and name not in SECRETS
    }
    return UNIT.format(
        url=layout.url.replace("%", "%%"),
        tree=str(layout.tree).replace("%", "%%"),
        secrets=SECRETS_FILE,
        environment="\n".join(f"Environment={quoted(f'{k}={v}')}" for k, v in given.items()),
        python=quoted(sys.executable),
        manage=quoted(str(layout.tree / "manage.py")),
    )


def quoted(word: str) -> str:
    """One word of a unit's line, whatever is in it (systemd.syntax(7), systemd.unit(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
