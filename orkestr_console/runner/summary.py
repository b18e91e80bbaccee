"""The final output of `make run`: the console's URL, credentials and examples."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

from orkestr_console.runner.layout import Layout

TEXT = """
  Orkestr Console is serving ({seconds:.1f} s after the start)

    Console    {url}/
    Login      {user}
    Password   {password}
    API key    {api_key}
    Team       {team}
    Previews   {previews}

  With curl:

    export ORKESTR_BASE_URL={url} ORKESTR_API_KEY={api_key}
    curl -X POST $ORKESTR_BASE_URL/v1/templates \\
      -H "Authorization: Bearer $ORKESTR_API_KEY" -H "Content-Type: application/json" \\
      -d '{{"name": "data-stack", "base_template": "python-3.12",
           "recipe": ["pip install pandas numpy pyarrow"]}}'

  With the official SDK (pip install orkestr), once the template is ready:

    from orkestr import Sandbox
    with Sandbox.create(template="tmpl_...") as sbx:
        print(sbx.exec("python -c 'import pandas; print(pandas.__version__)'").stdout)

  These are also in {console_json}. Logs are in {log}.
  Ctrl-C stops the console and leaves sandboxes running; `make down` ends them too."""


@dataclass(frozen=True)
class Credentials:
    """The demo team's credentials."""

    user: str
    password: str
    team: str
    api_key: str


def summary(layout: Layout, credentials: Credentials, seconds: float) -> str:
    """The text for the operator's terminal; ``seconds`` is from the start to serving."""
    return TEXT.format(
        url=layout.url,
        seconds=seconds,
        previews=previews_line(layout),
        console_json=layout.console_json,
        log=layout.log,
        **asdict(credentials),
    )


def previews_line(layout: Layout) -> str:
    """Where a port of a sandbox is seen."""
    base = layout.preview_base
    return "off" if base is None else f"{base.scheme}://<port>-<sandbox>.{base.authority}/"


def write_console_json(layout: Layout, credentials: Credentials) -> None:
    """Write the URL and credentials for scripts, readable only by root, atomically."""
    staging = layout.console_json.with_suffix(".new")
    descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        json.dump({"url": layout.url, **asdict(credentials)}, stream, indent=2)
        stream.write("\n")
    staging.rename(layout.console_json)


def known_credentials(layout: Layout) -> Credentials | None:
    """The credentials that an earlier start wrote; None if unreadable."""
    try:
        record = json.loads(layout.console_json.read_text())
        return Credentials(*(record[name] for name in ("user", "password", "team", "api_key")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
