"""What happens at the end of a lifetime, and sandboxes that wake when they are used."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from orkestr_console.accounts import turns
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.accounts.models import AuditEntry, Plan, Team
from orkestr_console.accounts.services import authenticate_token
from orkestr_console.core.errors import PlanLimit
from orkestr_console.core.hosts import Steps, in_steps
from sandboxes_app.models import MAX_PAUSE, Sandbox, SandboxEvent, SandboxStatus
from sandboxes_app.services import lifecycle, waking
from tests.conftest import MakeKey, api_client
from tests.fakes.host import FakeHost

URL = "/v1/sandboxes"
WEEK = MAX_PAUSE.total_seconds()


def post(client: Client, path: str, body: dict[str, Any] | None = None) -> Any:
    return client.post(f"{URL}{path}", body or {}, content_type="application/json")


def boot(client: Client, **more: Any) -> str:
    answer = post(client, "", {"template": "debian-12", "timeout_seconds": 60, **more})
    assert answer.status_code == 201, answer.content
    return str(answer.json()["id"])


def asleep(client: Client, **more: Any) -> str:
    sandbox = boot(client, auto_resume=True, **more)
    assert post(client, f"/{sandbox}/pause").status_code == 200
    return sandbox


def kinds(sandbox: str) -> list[str]:
    return list(SandboxEvent.objects.filter(sandbox=sandbox).values_list("kind", flat=True))


def test_the_settings_are_kept_and_shown(api: Client, host: FakeHost) -> None:
    sandbox = boot(api, on_timeout="pause", auto_resume=True, preview_auth=True)
    shown = api.get(f"{URL}/{sandbox}").json()
    assert (shown["on_timeout"], shown["auto_resume"], shown["preview_auth"]) == (
        "pause",
        True,
        True,
    )
    assert len(shown["preview_auth_token"]) == 64
    other = boot(api, preview_auth=True)
    assert api.get(f"{URL}/{other}").json()["preview_auth_token"] != shown["preview_auth_token"]
    assert api.get(f"{URL}/{boot(api)}").json()["preview_auth_token"] is None


def test_the_host_is_told_to_pause_it(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, float | None] = {}

    def create(request: CreateSandbox) -> SandboxInfo:
        asked[request.id] = request.pause_seconds
        return FakeHost.create_sandbox(host, request)

    monkeypatch.setattr(host, "create_sandbox", create)
    pausing, ending = boot(api, on_timeout="pause"), boot(api)
    assert asked == {pausing: WEEK, ending: None}


def timed_out(host: FakeHost, sandbox: str) -> None:
    """Its deadline has passed, and the host has paused it."""
    Sandbox.objects.filter(pk=sandbox).update(expires_at=timezone.now() - timedelta(seconds=1))
    host.pause_sandbox(sandbox, time.time() + WEEK)


def look(api: Client, host: FakeHost, sandbox: str) -> None:
    api.get(f"{URL}/{sandbox}")


def hear(api: Client, host: FakeHost, sandbox: str) -> None:
    lifecycle.apply_changes([host.sandbox(sandbox)])


def compare(api: Client, host: FakeHost, sandbox: str) -> None:
    lifecycle.reconcile()


@pytest.mark.parametrize("notice", [look, hear, compare])
def test_at_its_deadline_it_is_paused(
    api: Client, host: FakeHost, notice: Callable[[Client, FakeHost, str], None]
) -> None:
    sandbox = boot(api, on_timeout="pause")
    timed_out(host, sandbox)
    notice(api, host, sandbox)
    shown = api.get(f"{URL}/{sandbox}").json()
    assert shown["status"] == "paused"
    assert shown["paused_expires_at"] == shown["expires_at"]
    assert kinds(sandbox) == ["created", "running", "paused"]
    assert post(api, f"/{sandbox}/resume").json()["status"] == "running"


def test_it_runs_on_until_the_host_has_paused_it(api: Client, host: FakeHost) -> None:
    sandbox = boot(api, on_timeout="pause")
    Sandbox.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    lifecycle.expire_overdue()
    assert Sandbox.objects.get(pk=sandbox).status == SandboxStatus.RUNNING


@pytest.mark.parametrize("notice", [look, hear, compare])
def test_without_a_slot_for_paused_ones_it_ends(
    api: Client, host: FakeHost, team: Team, notice: Callable[[Client, FakeHost, str], None]
) -> None:
    Plan.objects.filter(pk=team.plan_id).update(max_snapshots=1)
    first, second = (boot(api, on_timeout="pause") for _ in range(2))
    timed_out(host, first)
    notice(api, host, first)
    timed_out(host, second)
    notice(api, host, second)
    assert api.get(f"{URL}/{first}").json()["status"] == "paused"
    shown = api.get(f"{URL}/{second}").json()
    assert shown["status"] == "terminated"
    assert "as many paused sandboxes as it may have" in shown["error_message"]


@pytest.mark.timeout(30)
def test_who_finds_it_paused_waits_for_the_teams_turn_without_a_thread(
    api: Client, team: Team, host: FakeHost
) -> None:
    """Or those who wait could have all the threads, and who has the turn none."""
    sandbox = boot(api, on_timeout="pause")
    timed_out(host, sandbox)
    steps = lifecycle.settle_overdue.steps(Sandbox.objects.get(pk=sandbox))
    next(steps)
    with turns.turn(team.pk):
        assert isinstance(steps.send(host.sandbox(sandbox)), Future)
    with pytest.raises(StopIteration):
        steps.send(None)
    assert Sandbox.objects.get(pk=sandbox).is_paused


def test_a_paused_one_that_nobody_resumes_ends(api: Client, host: FakeHost) -> None:
    sandbox = boot(api, on_timeout="pause")
    timed_out(host, sandbox)
    look(api, host, sandbox)
    Sandbox.objects.update(expires_at=timezone.now() - timedelta(seconds=1))
    host.pause_sandbox(sandbox, time.time() - 1)
    assert api.get(f"{URL}/{sandbox}").json()["status"] == "terminated"


def run(client: Client, sandbox: str) -> Any:
    return post(client, f"/{sandbox}/exec", {"command": "true"})


def write(client: Client, sandbox: str) -> Any:
    return post(client, f"/{sandbox}/files", {"path": "/workspace/x", "content": "eA=="})


def look_inside(client: Client, sandbox: str) -> Any:
    return client.get(f"{URL}/{sandbox}/files/stat?path=/workspace/x")


USES = [run, write, look_inside]


@pytest.mark.parametrize("use", USES)
def test_whatever_uses_it_wakes_it(
    api: Client, host: FakeHost, use: Callable[[Client, str], Any]
) -> None:
    sandbox = asleep(api)
    before = timezone.now()
    assert use(api, sandbox).status_code == 200
    row = Sandbox.objects.get(pk=sandbox)
    assert row.status == SandboxStatus.RUNNING
    assert timedelta(seconds=59) < row.expires_at - before < timedelta(seconds=65)
    told = AuditEntry.objects.filter(action="sandbox.resume").values_list("outcome", "data")
    assert [(outcome, data["auto_resume"]) for outcome, data in told] == [("done", True)]
    assert not AuditEntry.objects.filter(outcome="denied").exists()


@pytest.mark.parametrize("use", USES)
def test_without_auto_resume_it_sleeps_on(
    api: Client, host: FakeHost, use: Callable[[Client, str], Any]
) -> None:
    sandbox = boot(api)
    post(api, f"/{sandbox}/pause")
    answer = use(api, sandbox)
    assert (answer.status_code, answer.json()["code"]) == (409, "sandbox_not_running")
    assert "resume it first" in answer.json()["detail"]


def test_a_token_that_only_reads_wakes_it_by_reading(
    api: Client, host: FakeHost, team: Team, make_key: MakeKey
) -> None:
    sandbox = asleep(api)
    reader = api_client(make_key(team, READ))
    assert run(reader, sandbox).status_code == 403
    assert Sandbox.objects.get(pk=sandbox).is_paused
    assert look_inside(reader, sandbox).status_code == 200
    assert Sandbox.objects.get(pk=sandbox).is_running


def test_what_does_not_use_it_lets_it_sleep(api: Client, host: FakeHost) -> None:
    sandbox = asleep(api)
    api.get(f"{URL}/{sandbox}")
    api.get(URL)
    assert post(api, f"/{sandbox}/pause").status_code == 409
    assert post(api, f"/{sandbox}/timeout", {"timeout_seconds": 60}).status_code == 409
    assert Sandbox.objects.get(pk=sandbox).is_paused


def test_others_do_not_wake_it(api: Client, host: FakeHost, other_api: Client) -> None:
    sandbox = asleep(api)
    assert run(other_api, sandbox).status_code == 404
    assert Sandbox.objects.get(pk=sandbox).is_paused


def test_a_full_plan_says_so(api: Client, host: FakeHost, team: Team) -> None:
    sandbox = asleep(api)
    Plan.objects.filter(pk=team.plan_id).update(max_concurrent_sandboxes=1)
    boot(api)
    answer = run(api, sandbox)
    assert (answer.status_code, answer.json()["code"]) == (403, "plan_limit")
    assert Sandbox.objects.get(pk=sandbox).is_paused


def test_a_host_that_is_away_says_so(api: Client, host: FakeHost) -> None:
    sandbox = asleep(api)
    host.down = True
    assert run(api, sandbox).status_code == 503


def test_one_that_ended_as_it_slept_says_so(api: Client, host: FakeHost) -> None:
    sandbox = asleep(api)
    host.delete_sandbox(sandbox)
    answer = run(api, sandbox)
    assert (answer.status_code, answer.json()["code"]) == (409, "sandbox_not_running")


async def test_nobody_waits_for_ever_for_another_process(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that another process is resuming, and never finishes."""
    seen: list[str] = []

    @in_steps
    def still_resuming(actor: object, sandbox_id: str) -> Steps[str]:
        seen.append(sandbox_id)
        yield from ()
        return SandboxStatus.RESUMING

    monkeypatch.setattr(waking, "resume_if_paused", still_resuming)
    monkeypatch.setattr(waking, "WAIT_SECONDS", 0.1)
    actor: Any = SimpleNamespace(user=None)
    await waking.wake(actor, "sbx")
    assert len(seen) > 1


async def test_nobody_fails_for_the_share_of_who_came_first(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for the same attempt; a share of the plan is one person's."""
    asked: list[int | None] = []

    @in_steps
    def resume(actor: Actor, sandbox_id: str) -> Steps[str]:
        user = actor.user.pk if actor.user else None
        asked.append(user)
        yield from ()
        if user == 1:
            raise PlanLimit("It is all that you may have.")
        return SandboxStatus.RUNNING

    monkeypatch.setattr(waking, "resume_if_paused", resume)
    people: list[Any] = [SimpleNamespace(user=SimpleNamespace(pk=pk)) for pk in (1, 1, 2, 2)]
    people.append(SimpleNamespace(user=None))
    came = [waking.wake(person, "sbx") for person in people]
    first, second, *others = await asyncio.gather(*came, return_exceptions=True)
    assert isinstance(first, PlanLimit)
    assert isinstance(second, PlanLimit)
    assert others == [None, None, None]
    assert asked == [1, 2]


def test_who_comes_second_resumes_nothing(
    api: Client, host: FakeHost, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = asleep(api)
    actor = authenticate_token(key, "rest", None)

    @in_steps
    def find_and_be_overtaken(actor: Actor, sandbox_id: str) -> Steps[Sandbox]:
        row = yield from lifecycle.find.steps(actor, sandbox_id)
        Sandbox.objects.filter(pk=sandbox).update(status=SandboxStatus.RESUMING)
        return row

    monkeypatch.setattr(waking, "find", find_and_be_overtaken)
    assert waking.resume_if_paused(actor, sandbox) == SandboxStatus.RESUMING
    assert host.sandbox(sandbox).paused
    assert not AuditEntry.objects.filter(action="sandbox.resume").exists()


def start(client: Client, sandbox: str) -> Any:
    return post(client, f"/{sandbox}/commands", {"command": "true"})


@pytest.mark.parametrize("use", [*USES, start])
def test_one_that_is_paused_between_the_row_and_the_host_wakes_too(
    api: Client, host: FakeHost, use: Callable[[Client, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = boot(api, on_timeout="pause", auto_resume=True)
    looks: list[str] = []

    def require_running(row: Sandbox) -> None:
        if not looks:
            timed_out(host, sandbox)
        looks.append(row.status)

    monkeypatch.setattr(waking, "require_running", require_running)
    assert use(api, sandbox).status_code in {200, 201}
    assert looks == ["running", "running"]
    assert kinds(sandbox)[-3:] == ["paused", "resuming", "resumed"]


def test_a_download_of_one_that_is_paused_just_then_wakes_it(
    api: Client, host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = boot(api, on_timeout="pause", auto_resume=True)
    host.write_file(sandbox, "/workspace/a", b"kept")
    made = post(api, f"/{sandbox}/files/presign-download", {"path": "/workspace/a"}).json()
    monkeypatch.setattr(waking, "require_running", pause_once(host, sandbox))
    answer = api.get(made["url"])
    assert (answer.status_code, kinds(sandbox)[-1]) == (200, "resumed")


def pause_once(host: FakeHost, sandbox: str) -> Callable[[Sandbox], None]:
    """What a look at its row does: the first time, it is paused right afterwards."""
    looks = iter([timed_out])

    def look_at(_: Sandbox) -> None:
        for pause in looks:
            pause(host, sandbox)

    return look_at
