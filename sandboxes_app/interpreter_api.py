"""The code interpreter over REST."""

from __future__ import annotations

from django.http import HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.describing import EVENTS, describe
from orkestr_console.http.json_api import json_response, no_content, read_json
from orkestr_console.http.steps import to_its_end
from orkestr_console.http.threads import in_thread
from sandboxes_app import presenters, services
from sandboxes_app.answers import (
    CodeEvent,
    CodeResult,
    ContextDetail,
    ContextList,
)
from sandboxes_app.api import streaming_response
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import CodeSpec, ContextSpec


def begin_code(request: ApiRequest, sandbox_id: str) -> services.CodeRun | services.CodeStream:
    """The first part of :func:`run_code`, in a thread."""
    spec = read_json(request, CodeSpec)
    if spec.stream:
        return services.code_stream(request.actor, sandbox_id, spec)
    return services.prepare_code(request.actor, sandbox_id, spec)


@describe(
    "Run code",
    notes="Answers when it ends, or with `stream: true` as events while it runs. If the client "
    "leaves, the code is interrupted. `interpreter_unavailable` if the image has no kernel for it.",
    body=CodeSpec,
    example={"code": "6 * 7"},
    answer=CodeResult,
    also={EVENTS: CodeEvent},
    errors=(Conflict,),
)
@api(scope=WRITE, first=begin_code, subject=Sandbox)
async def run_code(
    request: ApiRequest, run: services.CodeRun | services.CodeStream
) -> HttpResponseBase:
    """``POST …/code``: buffered, or as server-sent events with ``stream: true``."""
    if isinstance(run, services.CodeStream):
        return await streaming_response(request, run)
    outcome = await services.run_code(run)
    return await to_its_end(in_thread(code_answer, run, outcome))


def code_answer(run: services.CodeRun, outcome: services.CodeOutcome) -> HttpResponse:
    """What runs in a thread after a run, also if the client leaves meanwhile.

    It is recorded, and its output encoded.
    """
    return json_response(presenters.code_answer(services.conclude_code(run, outcome)))


@describe(
    "Create a context",
    notes="Answers once its kernel runs.",
    body=ContextSpec,
    example={"cwd": "/workspace"},
    answer=ContextDetail,
    status=201,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def create_context(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/code/contexts``: answers once its kernel runs."""
    spec = read_json(request, ContextSpec)
    context = yield from services.create_context.steps(request.actor, sandbox_id, spec)
    return json_response(presenters.context_detail(context), status=201)


@describe("List contexts", answer=ContextList, errors=(Conflict,))
@api(scope=READ, subject=Sandbox)
def list_contexts(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/code/contexts``: the newest first."""
    contexts = yield from services.list_contexts.steps(request.actor, sandbox_id)
    return json_response({"contexts": [presenters.context_detail(each) for each in contexts]})


@describe(
    "Restart a context",
    notes="What runs in it ends, and its variables are gone. Answers once its new kernel runs.",
    answer=ContextDetail,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def restart_context(request: ApiRequest, sandbox_id: str, context_id: str) -> Steps[HttpResponse]:
    """``POST …/code/contexts/{id}/restart``: answers once its new kernel runs."""
    context = yield from services.restart_context.steps(request.actor, sandbox_id, context_id)
    return json_response(presenters.context_detail(context))


@describe(
    "Remove a context",
    notes="Its kernel is killed, with everything that was started from it.",
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def remove_context(request: ApiRequest, sandbox_id: str, context_id: str) -> Steps[HttpResponse]:
    """``DELETE …/code/contexts/{id}``."""
    yield from services.remove_context.steps(request.actor, sandbox_id, context_id)
    return no_content()
