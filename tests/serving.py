"""The real web process, on a port of its own and over the test's database, with its log kept.

For what only a real server shows: what it makes of bytes that are no request, what ends up in its
log, and pages in a browser. There is no host agent behind it. A conftest or test takes part by
importing the fixture::

    from tests.serving import serving as serving
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.conf import settings

from tests.stack import free_port, wait_for

TREE = Path(__file__).resolve().parents[1]


class Serving:
    """One web process. ``url`` is where it answers."""

    def __init__(self, var: Path, database: dict[str, Any], **environment: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = var / "web.log"
        host = database["OPTIONS"].get("host") or database["HOST"]
        place = f"postgres://{database['USER']}@/{database['NAME']}?host={host}"
        self.environment = {
            **os.environ,
            "DATABASE_URL": place,
            "ORKESTR_VAR": str(var),
            "ORKESTR_SECRET_KEY": settings.SECRET_KEY,
            "ORKESTR_TOKEN_PEPPER": settings.TOKEN_PEPPER,
            "ORKESTR_PUBLIC_URL": "",
            "PORT": str(self.port),
            **environment,
        }
        self.manage("collectstatic", "--noinput", "-v0")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "serve"],
                cwd=TREE,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_for(self._answers, 120, self.log)
        except BaseException:
            self.close()
            raise

    def manage(self, *arguments: str) -> None:
        """Run a management command in the server's environment."""
        command = [sys.executable, "manage.py", *arguments]
        subprocess.run(command, cwd=TREE, env=self.environment, check=True, timeout=300)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        try:
            return self.client().get("/healthz").is_success
        except httpx.HTTPError:
            return False

    def client(self) -> httpx.Client:
        """A browser without scripts."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=20)

    def log(self) -> str:
        """Everything it logged so far."""
        return self._log.read_bytes().decode(errors="backslashreplace")

    def raw(self, data: bytes, until: bytes | None = None) -> bytes:
        """What it answers to these bytes until it has said ``until`` or closes the connection.

        Raises ``TimeoutError`` if it does neither.
        """
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(data)
            answer = b""
            try:
                while until is None or until not in answer:
                    chunk = connection.recv(65536)
                    if not chunk:
                        break
                    answer += chunk
            except ConnectionResetError:
                pass
            return answer

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def serving(django_db_setup: None) -> Iterator[Serving]:
    with tempfile.TemporaryDirectory(prefix="orkestr-serving-") as var:
        server = Serving(Path(var), settings.DATABASES["default"])
        yield server
        server.close()
