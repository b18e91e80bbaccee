"""Background commands over REST."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, HttpResponseBase

from hostruntime.wire.background import CommandInfo
from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict, InvalidInput
from orkestr_console.core.hosts import Steps
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.describing import (
    EVENTS,
    FLAG,
    Parameter,
    describe,
    number,
    read_flag,
)
from orkestr_console.http.json_api import json_response, no_content, read_json
from sandboxes_app import presenters, services
from sandboxes_app.answers import CommandDetail, CommandList, LogPart, StreamEvent
from sandboxes_app.api import sent_as_events
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import BackgroundSpec

DEFAULT_FOLLOW_SECONDS, MAX_FOLLOW_SECONDS = 300, 86_400
OFFSET = Parameter(
    "offset", number(0, services.LARGEST_OFFSET, 0), "Where to begin, in bytes of the output."
)
FOLLOW = Parameter("follow", FLAG, "Whether to stay for what it prints.")
FOLLOW_SECONDS = Parameter(
    "timeout_seconds",
    number(1, MAX_FOLLOW_SECONDS, DEFAULT_FOLLOW_SECONDS),
    "How long to follow, in seconds.",
)


@describe(
    "Start a background command",
    notes="Answers once it runs.",
    body=BackgroundSpec,
    example={"command": "python3 -m http.server 8000"},
    answer=CommandDetail,
    status=201,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def start_command(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``POST …/commands``: answers once it runs."""
    spec = read_json(request, BackgroundSpec)
    command = yield from services.start_command.steps(request.actor, sandbox_id, spec)
    return json_response(shown(request, command), status=201)


@describe("List background commands", answer=CommandList, errors=(Conflict,))
@api(scope=READ, subject=Sandbox)
def list_commands(request: ApiRequest, sandbox_id: str) -> Steps[HttpResponse]:
    """``GET …/commands``: all that are known of, the newest first."""
    commands = yield from services.list_commands.steps(request.actor, sandbox_id)
    listed = [shown(request, each) for each in commands]
    return json_response(CommandList(commands=listed))


@describe("Show a background command", answer=CommandDetail, errors=(Conflict,))
@api(scope=READ, subject=Sandbox)
def get_command(request: ApiRequest, sandbox_id: str, command_id: str) -> Steps[HttpResponse]:
    """``GET …/commands/{cid}``."""
    command = yield from services.get_command.steps(request.actor, sandbox_id, command_id)
    return json_response(shown(request, command))


def shown(request: ApiRequest, command: CommandInfo) -> CommandDetail:
    """A command, with what it was refused in words for the caller's team."""
    return presenters.command_detail(command, services.refusal_of(request.actor, command))


@describe(
    "Kill a background command",
    notes="With all its processes. Once more is no error; it stays in the list.",
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE, subject=Sandbox)
def kill_command(request: ApiRequest, sandbox_id: str, command_id: str) -> Steps[HttpResponse]:
    """``DELETE …/commands/{cid}``: idempotent; it stays in the list."""
    yield from services.kill_command.steps(request.actor, sandbox_id, command_id)
    return no_content()


@describe(
    "Read a background command's output",
    notes="A part of it, or with `follow=true` all of it as events until the command ends.",
    parameters=(OFFSET, FOLLOW, FOLLOW_SECONDS),
    answer=LogPart,
    also={EVENTS: StreamEvent},
    errors=(Conflict,),
)
@api(scope=READ, subject=Sandbox)
def read_logs(request: ApiRequest, sandbox_id: str, command_id: str) -> Steps[HttpResponseBase]:
    """``GET …/commands/{cid}/logs``: a part of the output, or with ``follow=true`` all of it.

    Followed, it is server-sent events like those of ``…/exec``, until the command ends or
    ``timeout_seconds`` are over.
    """
    offset = read_number(request, "offset", 0, (0, services.LARGEST_OFFSET))
    address = (request.actor, sandbox_id, command_id, offset)
    bounds = (1, MAX_FOLLOW_SECONDS)
    seconds = read_number(request, "timeout_seconds", DEFAULT_FOLLOW_SECONDS, bounds)
    if not read_flag(request, "follow"):
        logs = yield from services.read_logs.steps(*address)
        refusal = services.refusal_of(request.actor, logs.command)
        return json_response(presenters.command_logs(logs, offset, refusal))
    following = yield from services.begin_following.steps(*address, seconds)
    first, frames = services.started_frame(following), services.follow(following)
    return sent_as_events(request, first, frames, READ)


def read_number(request: HttpRequest, name: str, default: int, bounds: tuple[int, int]) -> int:
    """A number of the query string. Raises ``InvalidInput``."""
    text = request.GET.get(name)
    if not text:
        return default
    least, most = bounds
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    if is_number and least <= int(text) <= most:
        return int(text)
    sentence = f"must be a whole number from {least} to {most}."
    raise InvalidInput(f"{name}: {sentence}", fields={name: sentence})
