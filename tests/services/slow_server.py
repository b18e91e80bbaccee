"""The web process's server over an application that takes as long as its query says.

``python -m tests.services.slow_server PORT INTERIM_SECONDS``
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orkestr_console.settings")
django.setup()

from orkestr_console.core.listening import listen_on  # noqa: E402
from orkestr_console.http import interim  # noqa: E402 - after Django knows its settings
from orkestr_console.http.daphne import ConsoleServer  # noqa: E402
from orkestr_console.http.processes import Place  # noqa: E402


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """Answer after so many milliseconds."""
    await asyncio.sleep(int(scope["query_string"]) / 1000)
    headers = [(b"content-length", b"4")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"done"})


if __name__ == "__main__":
    interim.INTERIM_SECONDS = float(sys.argv[2])
    ConsoleServer(slow, Place.alone(listen_on(["127.0.0.1"], int(sys.argv[1])))).run()
