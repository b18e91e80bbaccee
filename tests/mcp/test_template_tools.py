"""The tools for templates: from a recipe to ready, and what an agent is told to do next."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
from channels.db import database_sync_to_async

from orkestr_console.accounts.models import Plan
from orkestr_console.mcp import template_tools
from orkestr_console.mcp.tool import Ctx
from templates_app import services
from templates_app.models import BuildStep, Template
from templates_app.services import Event
from tests.fakes.fixtures import run_queue
from tests.fakes.host import FakeHost
from tests.mcp.conftest import Connect
from tests.mcp.test_tools import TEMPLATE, done

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("host")]


async def test_a_template_from_nothing_to_ready(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        assert (made["status"], made["queue_place"]) == ("building", 1)
        assert "wait_for_template" in made["next_step"]
        await database_sync_to_async(run_queue)()
        heard: list[tuple[float, float | None, str | None]] = []

        async def note(progress: float, total: float | None, message: str | None) -> None:
            heard.append((progress, total, message))

        result = await client.call_tool(
            "wait_for_template", {"template_id": made["id"]}, progress_callback=note
        )
        ready = result.structured_content
        assert ready is not None
        assert ready["status"] == "ready"
        assert f"template={made['id']}" in ready["next_step"]
        assert [step["status"] for step in ready["steps"]] == ["succeeded", "succeeded"]
        assert ready["log_tail"] == "$ one\none: done\n\n$ two\ntwo: done\n"
        amounts = [amount for amount, _, _ in heard]
        assert amounts == sorted(set(amounts))
        assert [message for _, _, message in heard if message and "Running" in message] == [
            "Running step 1 of 2: one",
            "Running step 2 of 2: two",
        ]
        assert heard[-1] == (3, 3, "The template is ready.")
        listed = await done(client, "list_templates")
        assert [row["id"] for row in listed["templates"]] == [made["id"]]
        await done(client, "delete_template", template_id=made["id"])
        assert (await done(client, "list_templates"))["templates"] == []


async def test_the_making_of_an_image_is_told_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each amount is more than the one before, whatever the build counts, and none is the end."""
    heard: list[tuple[float, float, str]] = []

    async def events(_: str) -> AsyncGenerator[list[Event]]:
        counts = [(phase, n) for phase in ("capture", "contents") for n in range(0, 400, 2)]
        now = datetime.now(UTC)
        yield [Event(1, "step_finished", now, {"step": 2})]
        for number, (phase, n) in enumerate(counts, 2):
            said = {"phase": phase, "files": n * 1000, "bytes": n * 1_000_000}
            yield [Event(number, "progress", now, said)]
        yield [Event(500, "capture", now, {}), Event(501, "published", now, {})]

    class Listener:
        request_context = SimpleNamespace(meta={})

        async def report_progress(self, progress: float, total: float, message: str) -> None:
            heard.append((progress, total, message))

    monkeypatch.setattr(services, "follow_events", events)
    await template_tools.report_progress(cast("Ctx", Listener()), "tmpl_x", 2)
    assert len(heard) == 403
    amounts = [amount for amount, _, _ in heard]
    assert amounts == sorted(set(amounts))
    assert (amounts[0], max(amounts[1:-1]) < 2.95, amounts[-1]) == (2, True, 3)
    messages = [message for _, _, message in heard]
    assert messages[2] == "Capturing: 2,000 files, 2 MB so far."
    assert messages[400] == "Listing what is in it: 398,000 files, 398 MB so far."
    assert messages[401] == "The image has been captured."


async def test_waiting_ends_when_its_time_does(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        waited = await done(client, "wait_for_template", template_id=made["id"], timeout_seconds=1)
        assert waited["status"] == "building"
        cancelled = await done(client, "cancel_template", template_id=made["id"])
        assert (cancelled["status"], cancelled["error_code"]) == ("failed", "build_cancelled")


async def test_a_failed_build_says_what_to_do(connect: Connect, key: str, host: FakeHost) -> None:
    host.next_failure = {
        "code": "network_policy_blocked",
        "message": "Step 1 of 2 failed.",
        "refused": ["pypi.example"],
    }
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        failed = await done(client, "get_template", template_id=made["id"])
    assert (failed["status"], failed["refused_hosts"]) == ("failed", ["pypi.example"])
    assert "allow_domains" in failed["next_step"]


async def test_a_step_that_went_on_without_a_host_is_not_why_another_failed(
    connect: Connect, key: str, host: FakeHost
) -> None:
    host.refused = [
        {"host": "stats.example", "port": 443, "reason": "not_listed", "can_be_listed": True}
    ]
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        steps = BuildStep.objects.filter(number=2)
        await database_sync_to_async(Template.objects.update)(
            status="failed", error_code="step_failed"
        )
        await database_sync_to_async(steps.update)(status="failed", refused_hosts=[])
        failed = await done(client, "get_template", template_id=made["id"])
        assert failed["refused_hosts"] == ["stats.example"]
        assert failed["next_step"].startswith("Fix the failing step")
        await database_sync_to_async(steps.update)(refused_hosts=["stats.example"])
        failed = await done(client, "get_template", template_id=made["id"])
        assert "allow_domains" in failed["next_step"]


async def test_a_template_that_may_lack_something_says_what_to_do(
    connect: Connect, key: str, host: FakeHost
) -> None:
    host.refused = [
        {"host": "pypi.example", "port": 443, "reason": "not_listed", "can_be_listed": True}
    ]
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        ready = await done(client, "wait_for_template", template_id=made["id"])
    assert (ready["status"], ready["refused_hosts"]) == ("ready", ["pypi.example"])
    assert ready["steps"][0]["refused_hosts"] == ["pypi.example"]
    assert ready["next_step"].startswith("Call create_sandbox")
    assert "the network policy blocked pypi.example" in ready["next_step"]
    assert "allow_domains" in ready["next_step"]


PAST = [
    {
        "host": "keys.example",
        "port": 0,
        "reason": "not_listed",
        "can_be_listed": True,
        "direct": True,
    },
    {
        "host": "192.0.2.7",
        "port": 443,
        "reason": "past_proxy",
        "can_be_listed": False,
        "direct": True,
    },
]


@pytest.mark.parametrize("failed", [False, True])
async def test_what_went_past_the_proxy_says_which_setting_its_program_needs(
    connect: Connect, key: str, host: FakeHost, failed: bool
) -> None:
    host.refused = PAST
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        if failed:
            await database_sync_to_async(Template.objects.update)(
                status="failed", error_code="network_policy_blocked"
            )
        said = await done(client, "get_template", template_id=made["id"])
    warnings = said["steps"][0]["warnings"]
    assert len(warnings) == 2
    for warning in warnings:
        assert "$HTTPS_PROXY" in warning
        # The same words as on the step, which REST and the console show.
        assert warning.replace("This step", "Step 1") in said["next_step"]
    assert ("Call create_sandbox" in said["next_step"]) is not failed


async def test_what_is_baked_in_is_shown_as_rest_does(
    connect: Connect, key: str, host: FakeHost
) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE, env={"A": "1"})
        assert (made["env"], made["baked_env"]) == ({"A": "1"}, None)
        await database_sync_to_async(run_queue)()
        baked = {"A": "1", "B": "its base's"}
        await database_sync_to_async(Template.objects.update)(contents={"env": baked})
        ready = await done(client, "get_template", template_id=made["id"])
    assert (ready["env"], ready["baked_env"]) == ({"A": "1"}, baked)


@pytest.mark.parametrize("open_too", [True, False])
async def test_nothing_is_advised_that_the_plan_refuses(
    connect: Connect, key: str, host: FakeHost, open_too: bool
) -> None:
    host.refused = PAST[:1]
    await database_sync_to_async(Plan.objects.update)(
        custom_egress_allowlist=False, allow_open_network=open_too
    )
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        for status in ("ready", "failed"):
            await database_sync_to_async(Template.objects.update)(
                status=status, error_code="network_policy_blocked" if status == "failed" else ""
            )
            said = await done(client, "get_template", template_id=made["id"])
            advice = said["next_step"].partition("In allow_domains alone")[0]
            assert "has the default allowlist only" in advice
            assert "allow_domains" not in advice
            assert ("network 'open'" in advice) is open_too
            assert "larger plan" in advice


async def test_a_long_log_is_read_in_parts(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE)
        await database_sync_to_async(run_queue)()
        output = "".join(f"line {number} ä\n" for number in range(9000))
        template = await database_sync_to_async(Template.objects.get)(pk=made["id"])
        await database_sync_to_async(template.steps.filter(number=1).update)(output=output)
        whole, offset = "", 0
        while True:
            part = await done(
                client, "get_template_log", template_id=made["id"], offset=offset, limit=29_999
            )
            assert len(part["text"]) <= 29_999
            whole += part["text"]
            if (offset := part["next_offset"]) is None:
                break
        assert output in whole
        looked = await done(client, "get_template", template_id=made["id"])
        assert len(looked["log_tail"]) <= 4_001
        log = await client.read_resource(f"orkestr://templates/{made['id']}/log")
        assert "get_template_log, offset=30000" in log.contents[0].text  # type: ignore[union-attr]


async def test_a_long_recipe_is_read_in_parts(connect: Connect, key: str) -> None:
    steps = [f"echo {number} {'x' * 8000}" for number in range(100)]
    async with connect(key) as client:
        made = await done(client, "create_template", **{**TEMPLATE, "recipe": steps})
        assert len(json.dumps(made)) < 80_000
        assert [len(step["command"]) for step in made["steps"]] == [201] * 100
        found, start = [], 1
        while start is not None:
            part = await done(client, "get_template", template_id=made["id"], recipe_from=start)
            assert len(json.dumps(part["recipe"])) < 20_000
            found += part["recipe"]
            start = part["recipe_next"]
        assert found == steps
        past = await done(client, "get_template", template_id=made["id"], recipe_from=101)
        assert (past["recipe"], past["recipe_next"]) == ([], None)


async def test_an_agent_bakes_variables_in(connect: Connect, key: str, host: FakeHost) -> None:
    async with connect(key) as client:
        made = await done(client, "create_template", **TEMPLATE, env={"PATH": "/opt/x:$PATH"})
        assert made["env"] == {"PATH": "/opt/x:$PATH"}
        assert (await done(client, "create_template", **TEMPLATE))["env"] == {}


async def test_a_step_that_no_answer_has_room_for_is_shown_in_part(
    connect: Connect, key: str
) -> None:
    async with connect(key) as client:
        recipe = ["true", "x" * 100_000, "false"]
        made = await done(client, "create_template", **{**TEMPLATE, "recipe": recipe})
        assert made["recipe"] == ["true"]
        part = await done(
            client, "get_template", template_id=made["id"], recipe_from=made["recipe_next"]
        )
        assert part["recipe"][0].startswith("x" * 16_000 + "\n[… 84,000 more characters")
        assert part["recipe_next"] == 3
