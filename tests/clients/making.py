"""Makes templates over plain HTTP and sandboxes with the official SDK, and cleans up after."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from orkestr import OrkestrClient, Sandbox
from orkestr.errors import OrkestrError

BUILD_SECONDS = 300


@dataclass
class Templates:
    """Template calls of the REST API, and how long a build may take."""

    client: httpx.Client
    build_seconds: float = BUILD_SECONDS
    made: list[str] = field(default_factory=list)

    def create(self, base: str, *recipe: str, **fields: Any) -> str:
        """Ask for a template; its id, while it builds."""
        body = {"name": "under test", "base_template": base, "recipe": list(recipe), **fields}
        answer = self.client.post("/v1/templates", json=body)
        assert answer.status_code in {200, 201, 202}, answer.text
        record = answer.json()
        assert record["status"] == "building"
        self.made.append(record["id"])
        return str(record["id"])

    def get(self, template: str) -> dict[str, Any]:
        """The template as the API shows it."""
        answer = self.client.get(f"/v1/templates/{template}")
        assert answer.status_code == 200, answer.text
        record: dict[str, Any] = answer.json()
        return record

    def finished(self, template: str) -> dict[str, Any]:
        """The template once it builds no more."""
        deadline = time.monotonic() + self.build_seconds
        while (record := self.get(template))["status"] == "building":
            assert time.monotonic() < deadline, f"still building after {self.build_seconds} s"
            time.sleep(0.1)
        return record

    def events(self, template: str) -> list[dict[str, Any]]:
        """Every event of its build so far, a page at a time."""
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["seq"] if found else 0
            answer = self.client.get(f"/v1/templates/{template}/events", params={"after": after})
            assert answer.status_code == 200, answer.text
            if not (page := answer.json()["events"]):
                return found
            found += page

    def ready(self, base: str, *recipe: str, **fields: Any) -> str:
        """Make a template that must succeed; its id."""
        record = self.finished(self.create(base, *recipe, **fields))
        assert record["status"] == "ready", record
        return str(record["id"])

    def delete(self, template: str) -> None:
        """Delete one that exists."""
        answer = self.client.delete(f"/v1/templates/{template}")
        assert answer.status_code in {200, 204}, answer.text
        self.made.remove(template)

    def delete_all(self) -> None:
        """Delete what is left."""
        for template in list(self.made):
            self.delete(template)


@dataclass
class Sandboxes:
    """Sandboxes by the official SDK."""

    client: OrkestrClient
    booted: list[Sandbox] = field(default_factory=list)

    def boot(self, template: str, **options: Any) -> Sandbox:
        """A running sandbox."""
        sandbox = Sandbox.create(template=template, client=self.client, **options)
        self.booted.append(sandbox)
        assert sandbox.status == "running"
        return sandbox

    def terminate_all(self) -> None:
        """End what still runs; one that expired meanwhile is as good."""
        failures = []
        for sandbox in self.booted:
            try:
                sandbox.terminate()
            except OrkestrError as error:
                failures.append(error)
        assert failures == []
