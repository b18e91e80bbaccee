"""The self-check follows a build by what it tells, not by the clock."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from orkestr_console.runner import selfcheck as module
from orkestr_console.runner.selfcheck import SelfCheck, SelfCheckError
from tests.programs import WORKING, python, running


class Build:
    """A build as the REST API tells of it: a step starts every so often, then it is ready."""

    def __init__(self, steps: int, pause: float) -> None:
        self._began = time.monotonic()
        self._steps = steps
        self._pause = pause

    def __call__(self, request: httpx.Request) -> httpx.Response:
        done = int((time.monotonic() - self._began) / self._pause)
        if not request.url.path.endswith("/events"):
            return answer({"status": "ready" if done > self._steps else "building"})
        after, last = int(request.url.params["after"]), min(done, self._steps)
        rows = [
            {"seq": seq, "kind": "step_started", "step": seq, "total": self._steps}
            for seq in range(after + 1, last + 1)
        ]
        return answer({"events": rows})


def answer(record: dict[str, object]) -> httpx.Response:
    return httpx.Response(200, content=json.dumps(record))


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILD_SECONDS", 0.6)
    monkeypatch.setattr(module, "scaled", lambda seconds: seconds)


def checking(build: Build, said: list[str], pids: list[int]) -> SelfCheck:
    check = SelfCheck("http://console.invalid", "key", said.append, lambda: pids)
    check._client = httpx.Client(
        base_url=check.url, transport=httpx.MockTransport(build), trust_env=False
    )
    return check


def test_a_build_that_tells_of_itself_is_followed() -> None:
    said: list[str] = []
    checking(Build(steps=5, pause=0.4), said, [])._wait_until_ready("tmpl_1")
    assert said == [f"step {number} of 5" for number in range(1, 6)]


def test_a_build_that_is_worked_on_in_silence_is_waited_for() -> None:
    with running(python(WORKING, 30)) as process:
        checking(Build(steps=0, pause=2.5), [], [process.pid])._wait_until_ready("tmpl_1")


def test_a_build_that_nobody_works_on_is_given_up_on() -> None:
    with (
        running(["sleep", "600"]) as process,
        pytest.raises(SelfCheckError, match=r"still building, .* did nothing for 0.6 s \(sleep"),
    ):
        checking(Build(steps=1, pause=600), [], [process.pid])._wait_until_ready("tmpl_1")
