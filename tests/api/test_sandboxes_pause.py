"""Pausing a sandbox and taking it up again, and what is left of either when the host fails."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.test import Client
from django.utils import timezone
from django.utils.dateparse import parse_datetime

from hostruntime.errors import ContainerGone, HostFault, HostUnavailable
from orkestr_console.accounts.models import Plan, Team
from sandboxes_app import tasks
from sandboxes_app.models import Sandbox, SandboxEvent
from tests.api.asking import post, refusal
from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"


def boot(api: Client, **changes: object) -> str:
    answer = post(api, URL, {"template": "debian-12", **changes})
    assert answer.status_code == 201, answer.content
    return str(answer.json()["id"])


def test_one_that_the_host_paused_a_moment_ago_is_not_running(api: Client, host: FakeHost) -> None:
    box = boot(api)
    host.pause_sandbox(box, None)
    refusal(post(api, f"{URL}/{box}/exec", {"command": "true"}), 409, "sandbox_not_running")
    refusal(api.get(f"{URL}/{box}/files?path=/tmp"), 409, "sandbox_not_running")


def status(api: Client, box: str) -> str:
    return str(api.get(f"{URL}/{box}").json()["status"])


def test_a_paused_sandbox_stands_still_and_runs_on(api: Client, host: FakeHost) -> None:
    box = boot(api, timeout_seconds=300)
    assert post(api, f"{URL}/{box}/pause", {}).json() == {"sandbox_id": box}
    paused = api.get(f"{URL}/{box}").json()
    assert paused["status"] == "paused"
    kept = parse_datetime(paused["paused_expires_at"])
    assert kept is not None
    assert timedelta(days=6) < kept - timezone.now() <= timedelta(days=7)
    assert host.booted[box].info.paused
    answer = refusal(
        post(api, f"{URL}/{box}/exec", {"command": "true"}), 409, "sandbox_not_running"
    )
    assert "resume it" in answer["detail"]
    refusal(api.get(f"{URL}/{box}/files?path=/tmp"), 409, "sandbox_not_running")
    refusal(post(api, f"{URL}/{box}/pause", {}), 409, "sandbox_not_running")

    resumed = post(api, f"{URL}/{box}/resume", {}).json()
    assert (resumed["status"], resumed["paused_expires_at"]) == ("running", None)
    ends = parse_datetime(resumed["expires_at"])
    assert ends is not None
    assert timedelta(seconds=290) < ends - timezone.now() <= timedelta(seconds=300)
    assert host.booted[box].info.deadline == pytest.approx(ends.timestamp(), abs=1)
    assert post(api, f"{URL}/{box}/exec", {"command": "true"}).status_code == 200
    kinds = SandboxEvent.objects.filter(sandbox=box).values_list("kind", flat=True)
    assert list(kinds)[-4:] == ["pausing", "paused", "resuming", "resumed"]


def test_what_is_not_paused_is_not_resumed(api: Client, host: FakeHost) -> None:
    box = boot(api)
    refusal(post(api, f"{URL}/{box}/resume", {}), 409, "sandbox_not_paused")
    api.delete(f"{URL}/{box}")
    refusal(post(api, f"{URL}/{box}/pause", {}), 409, "sandbox_not_running")


def test_a_paused_one_can_be_terminated(api: Client, host: FakeHost) -> None:
    box = boot(api)
    post(api, f"{URL}/{box}/pause", {})
    assert api.delete(f"{URL}/{box}").status_code == 204
    assert status(api, box) == "terminated"
    assert box not in host.booted


def test_it_has_a_place_of_its_own(api: Client, host: FakeHost, team: Team) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_sandboxes=1, max_snapshots=1)
    first = boot(api)
    post(api, f"{URL}/{first}/pause", {})
    second = boot(api)
    refusal(post(api, f"{URL}/{second}/pause", {}), 409, "snapshot_cap_reached")
    assert status(api, second) == "running"
    answer = refusal(post(api, f"{URL}/{first}/resume", {}), 403, "plan_limit")
    assert answer["limit"] == "max_concurrent_sandboxes"
    assert status(api, first) == "paused"
    api.delete(f"{URL}/{second}")
    assert post(api, f"{URL}/{first}/resume", {}).status_code == 200


def test_one_that_nobody_resumes_ends(api: Client, host: FakeHost) -> None:
    box = boot(api)
    post(api, f"{URL}/{box}/pause", {})
    end = timezone.now() - timedelta(seconds=1)
    Sandbox.objects.filter(pk=box).update(expires_at=end)
    host.pause_sandbox(box, end.timestamp())
    assert status(api, box) == "terminated"


def test_a_pause_that_fails_leaves_it_running(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = boot(api)

    def refuse(*_: object) -> None:
        raise HostFault("The kernel did not freeze it.")

    monkeypatch.setattr(host, "pause_sandbox", refuse)
    assert post(api, f"{URL}/{box}/pause", {}).status_code == 500
    assert status(api, box) == "running"


def test_a_container_that_is_gone_is_said_to_be(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = boot(api)
    post(api, f"{URL}/{box}/pause", {})
    host.end(box, "exited")

    def refuse(*_: object) -> None:
        raise ContainerGone("It is not running.")

    monkeypatch.setattr(host, "resume_sandbox", refuse)
    refusal(post(api, f"{URL}/{box}/resume", {}), 409, "sandbox_not_running")
    assert status(api, box) == "failed"


@pytest.mark.parametrize("done", [True, False])
def test_a_host_that_did_not_answer_is_asked_later(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    box = boot(api)
    pause = host.pause_sandbox

    def lose_the_answer(sandbox_id: str, deadline: float | None) -> None:
        if done:
            pause(sandbox_id, deadline)
        raise HostUnavailable("The agent does not answer.")

    monkeypatch.setattr(host, "pause_sandbox", lose_the_answer)
    assert post(api, f"{URL}/{box}/pause", {}).status_code == 503
    assert status(api, box) == "pausing"
    tasks.tidy()
    assert status(api, box) == ("paused" if done else "running")


def test_a_paused_one_whose_machine_restarted_has_failed(api: Client, host: FakeHost) -> None:
    box = boot(api)
    post(api, f"{URL}/{box}/pause", {})
    host.end(box, "host_lost")
    tasks.tidy()
    assert status(api, box) == "failed"
