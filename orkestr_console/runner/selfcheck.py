"""The self-check: from a recipe to a command's output, through the REST API."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from hostruntime.host.patience import Patience, Pids, scaled

NAME = "self-check"
BASE = "debian-12"
RECIPE = ("echo baked > /root/.self-check", 'test "$(cat /root/.self-check)" = baked')
COMMAND = "cat /root/.self-check"
# How long the build may report nothing while no program of the installation works.
BUILD_SECONDS = 120
ANSWER_SECONDS = 60


class SelfCheckError(Exception):
    """A step of the self-check failed; the message says which and how."""


@dataclass
class SelfCheck:
    """One run against ``url``; ``times`` has a row (step, seconds) for each step that passed.

    ``pids`` are the installation's processes, if visible.
    """

    url: str
    api_key: str
    report: Callable[[str], None]
    pids: Pids = tuple
    times: list[tuple[str, float]] = field(default_factory=list)

    def run(self) -> None:
        """Build, boot, exec, terminate, delete; leaves nothing. Raises ``SelfCheckError``."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        with httpx.Client(
            base_url=self.url, headers=headers, timeout=scaled(ANSWER_SECONDS), trust_env=False
        ) as client:
            self._client = client
            self._remove_leftovers()
            template = self._build()
            try:
                self._use(template)
            finally:
                with self._timed("delete the template"):
                    self._call("DELETE", f"/v1/templates/{template}")

    def _build(self) -> str:
        with self._timed(f"build a template of {len(RECIPE)} steps on {BASE}"):
            body = {"name": NAME, "base_template": BASE, "recipe": list(RECIPE)}
            template = str(self._call("POST", "/v1/templates", body)["id"])
            try:
                self._wait_until_ready(template)
            except BaseException:
                self._call("DELETE", f"/v1/templates/{template}")
                raise
        return template

    def _wait_until_ready(self, template: str) -> None:
        """Follow the build's events until it is ready, while it makes any progress."""
        events = 0
        patience = Patience(scaled(BUILD_SECONDS), self.pids, marker=lambda: events)
        while not patience.exhausted():
            found = self._call("GET", f"/v1/templates/{template}")
            if found["status"] == "ready":
                return
            if found["status"] == "failed":
                raise SelfCheckError(f"the template failed: {found.get('error_message')}")
            events = self._follow(template, events)
            time.sleep(0.1)
        raise SelfCheckError(
            f"the template is still {found['status']}, and the installation {patience.reason}"
        )

    def _follow(self, template: str, after: int) -> int:
        """Report the build's progress; the number of its last event."""
        page = self._call("GET", f"/v1/templates/{template}/events?after={after}")
        for event in page["events"]:
            after = event["seq"]
            if event["kind"] == "step_started":
                self.report(f"step {event['step']} of {event['total']}")
        return after

    def _use(self, template: str) -> None:
        with self._timed("boot a sandbox from it"):
            sandbox = str(self._call("POST", "/v1/sandboxes", {"template": template})["id"])
        try:
            with self._timed("run a command in it"):
                answer = self._call("POST", f"/v1/sandboxes/{sandbox}/exec", {"command": COMMAND})
            if answer["stdout"] != "baked\n" or answer["exit_code"] != 0:
                raise SelfCheckError(f"{COMMAND} answered {answer}")
        finally:
            with self._timed("terminate the sandbox"):
                self._call("DELETE", f"/v1/sandboxes/{sandbox}")

    def _remove_leftovers(self) -> None:
        """Delete the templates that killed self-checks left."""
        for row in self._call("GET", "/v1/templates?limit=200")["templates"]:
            if row["name"] == NAME:
                self._call("DELETE", f"/v1/templates/{row['id']}")

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        self.report(step)
        started = time.monotonic()
        yield
        self.times.append((step, time.monotonic() - started))

    def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise SelfCheckError(f"{method} {path}: {error or type(error).__name__}") from error
        if answer.is_error:
            raise SelfCheckError(f"{method} {path} answered {answer.status_code}: {answer.text}")
        record: dict[str, Any] = answer.json() if answer.content else {}
        return record
