"""The few questions the start of an installation asks the host agent on its Unix socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# Building a base downloads a Debian or a set of wheels: minutes on a slow link.
PATIENCE = httpx.Timeout(30, read=600)


@dataclass(frozen=True)
class Base:
    """A built-in image as the agent lists it."""

    name: str
    state: str
    size_bytes: int


class HostApi:
    """A connection to the agent of one installation. Raises ``httpx.HTTPError`` throughout."""

    def __init__(self, socket: Path) -> None:
        transport = httpx.HTTPTransport(uds=str(socket))
        # The host in the address is a formality: the transport goes to the socket.
        self._client = httpx.Client(transport=transport, base_url="http://host", timeout=PATIENCE)

    def __enter__(self) -> HostApi:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def health(self) -> dict[str, Any]:
        """What the agent says of itself."""
        return self._get("/health")

    def bases(self) -> list[Base]:
        """The built-in images, in the order in which they build on each other."""
        return [
            Base(row["name"], row["state"], int(row.get("size_bytes") or 0))
            for row in self._get("/bases")["bases"]
        ]

    def build_base(self, name: str) -> Iterator[dict[str, Any]]:
        """Build a base if it is missing; yields its progress, the last one `done` or `error`."""
        with self._client.stream("POST", f"/bases/{name}") as answer:
            answer.raise_for_status()
            yield from (json.loads(line) for line in answer.iter_lines() if line.strip())

    def sandboxes(self) -> list[str]:
        """Ids of the sandboxes that run on this host now."""
        rows = self._get("/sandboxes")["sandboxes"]
        return [row["id"] for row in rows if row["state"] == "running"]

    def terminate(self, sandbox: str) -> None:
        """End one sandbox; one that is gone already is no error."""
        self._client.delete(f"/sandboxes/{sandbox}").raise_for_status()

    def _get(self, path: str) -> dict[str, Any]:
        answer = self._client.get(path)
        answer.raise_for_status()
        record: dict[str, Any] = answer.json()
        return record


def agent_answers(socket: Path) -> bool:
    """Whether an agent answers on ``socket`` now."""
    try:
        with HostApi(socket) as host:
            host.health()
    except (httpx.HTTPError, OSError):
        return False
    return True
