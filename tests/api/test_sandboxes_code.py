"""``/v1/sandboxes/{id}/code``: running code, and its contexts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.db import connections
from django.test import Client

from hostruntime.errors import (
    ContextBusy,
    CwdNotFound,
    HostError,
    HostUnavailable,
    InterpreterUnavailable,
    TooManyContexts,
)
from hostruntime.wire.interpreter import CodeError, CodeFrame, CodeResult
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import AuditEntry
from sandboxes_app import services
from sandboxes_app.specs import CodeSpec
from tests.api.asking import post, refusal
from tests.api.test_sandboxes_exec import AsyncApi, events
from tests.fakes.host import FakeHost

RAISED = CodeError("ValueError", "bad", ("Traceback", "line 1"))
FRAMES: list[CodeFrame | HostError] = [
    CodeFrame("started", context_id="default", restarted=True),
    CodeFrame("stream", text="out"),
    CodeFrame("stream", stream="stderr", text="err"),
    CodeFrame("result", result=CodeResult("x", png="eA==", chart={"type": "line"})),
    CodeFrame("result", result=CodeResult(svg="<svg/>")),
    CodeFrame("error", error=RAISED),
    CodeFrame(
        "done",
        context_id="default",
        restarted=True,
        execution_count=3,
        duration_ms=5,
        interrupted=True,
        truncated=("stdout",),
    ),
]
END = {
    "error": {"name": "ValueError", "value": "bad", "traceback": ["Traceback", "line 1"]},
    "execution_count": 3,
    "context_id": "default",
    "duration_ms": 5,
    "interrupted": True,
    "restarted": True,
    "truncated": ["stdout"],
}
FIGURE = {"text": "x", "html": None, "svg": None, "png": "eA==", "json": None}
RESULTS = [
    {**FIGURE, "type": "chart", "chart": {"type": "line"}},
    {**dict.fromkeys(FIGURE), "html": "<svg/>", "svg": "<svg/>", "type": "html", "chart": None},
]


@pytest.fixture
def box(api: Client, host: FakeHost) -> str:
    answer = post(api, "/v1/sandboxes", {"template": "debian-12"})
    return f"/v1/sandboxes/{answer.json()['id']}"


@pytest.fixture
async def stream_api(plans: None, key: str) -> AsyncIterator[AsyncApi]:
    yield AsyncApi(key)
    # The views ran in asgiref's own thread, whose connection nobody else would close.
    await sync_to_async(connections.close_all)()


async def run_in(stream_api: AsyncApi, code: str, *, stream: bool = True) -> Any:
    """Run code in a new sandbox."""
    created = await stream_api.post("/v1/sandboxes", {"template": "debian-12"})
    box = f"/v1/sandboxes/{created.json()['id']}"
    return await stream_api.post(f"{box}/code", {"code": code, "stream": stream})


def test_a_run_is_answered_as_the_contract_has_it(api: Client, host: FakeHost, box: str) -> None:
    host.code["1/0"] = FRAMES
    body = {"code": "1/0", "language": "Py", "context_id": None, "timeout_seconds": 7}
    answer = post(api, f"{box}/code", body)
    assert answer.status_code == 200
    assert answer.json() == {"results": RESULTS, "stdout": "out", "stderr": "err", **END}
    [asked] = host.coded
    assert (asked.language, asked.context_id, asked.timeout_seconds) == ("python", None, 7)
    entry = AuditEntry.objects.get(action="sandbox.run_code")
    assert entry.data == {"context": "default", "duration_ms": 5}
    assert host.running.by_scope() == {}


async def test_a_stream_ends_with_done(stream_api: AsyncApi, host: FakeHost) -> None:
    host.code["1/0"] = FRAMES
    assert await events(await run_in(stream_api, "1/0")) == [
        {"kind": "started", "context_id": "default", "restarted": True},
        {"kind": "stream", "stream": "stdout", "text": "out"},
        {"kind": "stream", "stream": "stderr", "text": "err"},
        *({"kind": "result", "result": each} for each in RESULTS),
        {"kind": "error", "error": END["error"]},
        {"kind": "done", **END},
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InterpreterUnavailable("It has no ipykernel."), 409, "interpreter_unavailable"),
        (ContextBusy("It runs other code."), 409, "context_busy"),
        (HostUnavailable("Gone."), 503, "host_unavailable"),
    ],
)
async def test_what_cannot_be_run_is_an_error_of_its_own(
    stream_api: AsyncApi, host: FakeHost, error: HostError, status: int, code: str, stream: bool
) -> None:
    host.code["x"] = [error]
    refusal(await run_in(stream_api, "x", stream=stream), status, code)


async def test_an_error_within_a_stream_has_a_code(stream_api: AsyncApi, host: FakeHost) -> None:
    host.code["x"] = [FRAMES[0], HostUnavailable("Gone.")]
    *_, last = await events(await run_in(stream_api, "x"))
    assert (last["kind"], last["error_code"]) == ("error", "host_unavailable")
    assert "variables" in last["error"]["value"]


def test_contexts_are_made_listed_restarted_and_removed(
    api: Client, host: FakeHost, box: str
) -> None:
    made = post(api, f"{box}/code/contexts", {"cwd": "/tmp"})
    assert made.status_code == 201
    context = made.json()
    assert context["context_id"].startswith("ctx_")
    assert (context["language"], context["cwd"], context["alive"]) == ("python", "/tmp", True)
    assert (context["executions"], context["last_used_at"]) == (0, None)
    assert context["created_at"].endswith("Z")
    assert api.get(f"{box}/code/contexts").json() == {"contexts": [context]}
    one = f"{box}/code/contexts/{context['context_id']}"
    assert post(api, f"{one}/restart").json() == context
    ran = post(api, f"{box}/code", {"code": "1", "context_id": context["context_id"]})
    assert ran.json()["context_id"] == context["context_id"]
    assert api.delete(one).status_code == 204
    for answer in (api.delete(one), post(api, f"{one}/restart")):
        refusal(answer, 404, "context_not_found")
    ran = post(api, f"{box}/code", {"code": "1", "context_id": context["context_id"]})
    refusal(ran, 404, "context_not_found")
    refusal(api.delete(f"{box}/code/contexts/a%20b"), 404, "context_not_found")
    for failure, status in ((CwdNotFound("No."), 400), (TooManyContexts("Eight."), 409)):
        host.kernel_fails = failure
        refusal(post(api, f"{box}/code/contexts"), status, failure.code)


def test_a_sandbox_that_is_gone_has_none(api: Client, host: FakeHost, box: str) -> None:
    host.delete_sandbox(box.rpartition("/")[2])
    refusal(api.get(f"{box}/code/contexts"), 409, "sandbox_not_running")
    refusal(post(api, f"{box}/code", {"code": "1"}), 409, "sandbox_not_running")


async def test_who_leaves_interrupts_and_that_is_recorded(
    stream_api: AsyncApi, actor: Actor, host: FakeHost
) -> None:
    host.code["x"] = FRAMES
    box = (await stream_api.post("/v1/sandboxes", {"template": "debian-12"})).json()["id"]
    spec = CodeSpec(code="x", stream=True)
    frames = await sync_to_async(services.code_stream)(actor, box, spec)
    assert (await anext(frames))["kind"] == "started"
    await frames.aclose()
    assert host.interrupted == ["x"]
    entries = AuditEntry.objects.filter(action="sandbox.run_code").order_by("id")
    assert [entry.data async for entry in entries] == [
        {"stream": True},
        {"ended": "the client went away"},
    ]
