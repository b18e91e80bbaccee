"""Templates over REST."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from time import monotonic
from weakref import WeakKeyDictionary

from django.http import HttpRequest, HttpResponse, HttpResponseBase

from orkestr_console.accounts.actor import READ, WRITE
from orkestr_console.core.errors import Conflict, DomainError, InvalidInput, NotFound
from orkestr_console.core.postgres import release_connection
from orkestr_console.http.decorators import ApiRequest, api, revalidate
from orkestr_console.http.describing import (
    EVENTS,
    FLAG,
    LIMIT,
    LINES,
    PAGING,
    TEXT,
    Parameter,
    describe,
    number,
    read_flag,
)
from orkestr_console.http.json_api import json_response, no_content, read_json
from orkestr_console.http.paging import read_limit
from orkestr_console.http.streams import OwningStream
from orkestr_console.http.threads import in_thread
from templates_app import presenters, services
from templates_app.answers import (
    BaseList,
    BuildEvent,
    ContentsDetail,
    DifferenceDetail,
    EventList,
    TemplateDetail,
    TemplateList,
)
from templates_app.models import Template
from templates_app.services import contents
from templates_app.specs import TemplateSpec

MAX_TEMPLATE_BODY = 8 * 1024 * 1024
MAX_DIGITS = 9  # digits
NUMBER = number(0, 10**MAX_DIGITS - 1, 0)
TEXT_NUMBER = {"type": "string", "pattern": f"^[0-9]{{0,{MAX_DIGITS}}}$"}
AFTER = Parameter("after", NUMBER, "Only events after this number.")
LAST_EVENT_ID = Parameter(
    "Last-Event-ID", TEXT_NUMBER, "Instead of `after`, as browsers reconnect.", where="header"
)
FOLLOW = Parameter("follow", FLAG, "Whether to stay for the events to come.")
LOG_FORMAT = Parameter(
    "format",
    {"type": "string", "enum": ["text", "jsonl"], "default": "text"},
    "The output of the steps as text, or the events as JSON lines.",
)
COMPARE = Parameter("compare", {"type": "string"}, "The id of another template.")
KEEP_ALIVE = b": the build is still running\n\n"
# Re-check the token this often.
TOKEN_RECHECK_SECONDS = 10.0  # seconds
# How long a client waits before it reconnects, in milliseconds.
RETRY_FIELD = b"retry: 1000\n\n"
# Everybody who watches a build shares its events (services.events), so share their encoding too.
_encoded: WeakKeyDictionary[services.Event, bytes] = WeakKeyDictionary()


@describe(
    "Create a template",
    notes="Answers immediately; the build runs in the background.",
    body=TemplateSpec,
    example={
        "name": "data-tools",
        "base_template": "python-3.12",
        "recipe": ["pip install polars"],
    },
    answer=TemplateDetail,
    status=201,
    errors=(Conflict, NotFound),
)
@api(scope=WRITE)
def create_template(request: ApiRequest) -> HttpResponse:
    """``POST /v1/templates``: answers immediately; the build runs in the background."""
    # A recipe of 1 MiB, with room for JSON's escaping of each character.
    spec = read_json(request, TemplateSpec, max_bytes=MAX_TEMPLATE_BODY)
    return detail_answer(services.create_template(request.actor, spec), status=201)


@describe(
    "List base images",
    notes="What a template or sandbox can start from, beside the team's templates.",
    answer=BaseList,
    extension=True,
)
@api(scope=READ)
def list_bases(request: ApiRequest) -> HttpResponse:
    """``GET /v1/bases``: the built-in ones, each with its state on the host."""
    bases = services.list_built_in(request.actor)
    return json_response({"bases": [presenters.base_detail(base) for base in bases]})


@describe("List templates", parameters=PAGING, answer=TemplateList)
@api(scope=READ)
def list_templates(request: ApiRequest) -> HttpResponse:
    """``GET /v1/templates``: the team's, newest first."""
    rows, cursor = services.list_templates(
        request.actor,
        limit=read_limit(request.GET.get("limit")),
        cursor=request.GET.get("cursor"),
    )
    listed = [presenters.template_summary(row) for row in rows]
    return json_response(TemplateList(templates=listed, next_cursor=cursor))


@describe("Show a template", answer=TemplateDetail)
@api(scope=READ)
def get_template(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}``."""
    return detail_answer(services.get_template(request.actor, template_id))


@describe(
    "Delete a template",
    notes="And its image. Running sandboxes keep working.",
    status=204,
    errors=(Conflict,),
)
@api(scope=WRITE)
def delete_template(request: ApiRequest, template_id: str) -> HttpResponse:
    """``DELETE /v1/templates/{id}``."""
    services.delete_template(request.actor, template_id)
    return no_content()


@describe(
    "Cancel a build",
    notes="The template has failed by the time this answers.",
    answer=TemplateDetail,
    errors=(Conflict,),
    extension=True,
)
@api(scope=WRITE)
def cancel_template(request: ApiRequest, template_id: str) -> HttpResponse:
    """``POST /v1/templates/{id}/cancel``: the template has failed by the time this answers."""
    return detail_answer(services.cancel_template(request.actor, template_id))


def detail_answer(template: Template, status: int = 200) -> HttpResponse:
    """A template with its steps."""
    steps, position = services.list_steps(template), services.queue_position(template)
    return json_response(presenters.template_detail(template, steps, position), status=status)


@describe(
    "List a build's events",
    notes="A page of them, or with `follow=true` a stream to the build's end.",
    parameters=(AFTER, FOLLOW, LIMIT, LAST_EVENT_ID),
    answer=EventList,
    also={EVENTS: BuildEvent},
    extension=True,
)
@api(scope=READ)
def list_events(request: ApiRequest, template_id: str) -> HttpResponseBase:
    """``GET /v1/templates/{id}/events``: a page of events, or a stream with ``follow=true``."""
    after = read_after(request)
    if read_flag(request, "follow"):
        template = services.get_template(request.actor, template_id)
        return streaming_response(
            request, event_stream(request, template.pk, after), "text/event-stream"
        )
    limit = read_limit(request.GET.get("limit"))
    page = services.read_events(request.actor, template_id, after=after, limit=limit)
    return json_response(presenters.event_page(page, after))


def read_after(request: HttpRequest) -> int:
    """The last event the client has: ``Last-Event-ID`` after a reconnect, else ``after``.

    Raises ``InvalidInput`` unless it is a whole number.
    """
    # The one that doesn't count is checked as well: nothing that was sent is ignored.
    said = (request.headers.get("Last-Event-ID"), request.GET.get("after"))
    given = [text for text in said if text]
    for text in given:
        if not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
            sentence = "must be the number of an event, 0 or more."
            raise InvalidInput(f"after: {sentence}", fields={"after": sentence})
    return int(given[0]) if given else 0


async def event_stream(request: HttpRequest, template_id: str, after: int) -> AsyncIterator[bytes]:
    """Server-sent events (HTML Living Standard, 9.2) until the end; their ids are the numbers.

    Comments keep the stream of a silent build alive. A client that loses access gets an error
    instead of more events, at most ``TOKEN_RECHECK_SECONDS`` later.
    """
    yield RETRY_FIELD
    trusted_until = monotonic() + TOKEN_RECHECK_SECONDS
    async with aclosing(services.follow_events(template_id, after)) as batches:
        async for batch in batches:
            if not batch or monotonic() >= trusted_until:
                error = await in_thread(access_error, request, template_id)
                if error is not None:
                    yield encode_error(error)
                    return
                trusted_until = monotonic() + TOKEN_RECHECK_SECONDS
            yield b"".join(encode_event(event) for event in batch) or KEEP_ALIVE


def encode_event(event: services.Event) -> bytes:
    """One event; encoded once for all viewers, and cached as long as the event itself lives."""
    encoded = _encoded.get(event)
    if encoded is None:
        data = json.dumps(presenters.event_detail(event), separators=(",", ":"))
        encoded = f"id: {event.seq}\nevent: {event.kind}\ndata: {data}\n\n".encode()
        _encoded[event] = encoded
    return encoded


def encode_error(error: DomainError) -> bytes:
    """Why the stream ends before the build. It has no id, so the client keeps the last event's."""
    payload = {"kind": "error", "code": error.code, "message": error.detail}
    return f"event: error\ndata: {json.dumps(payload, separators=(',', ':'))}\n\n".encode()


def access_error(request: HttpRequest, template_id: str) -> DomainError | None:
    """Why the token can no longer read the template; None while it can."""
    return revalidate(request, lambda actor: services.get_template(actor, template_id))


@describe(
    "Download a build's log",
    parameters=(LOG_FORMAT,),
    also={TEXT: {"type": "string"}, LINES: BuildEvent},
    extension=True,
)
@api(scope=READ)
def get_log(request: ApiRequest, template_id: str) -> HttpResponseBase:
    """``GET /v1/templates/{id}/log``: text, or with ``format=jsonl`` the events as JSON lines."""
    template = services.get_template(request.actor, template_id)
    log_format = request.GET.get("format") or "text"
    if log_format not in {"text", "jsonl"}:
        sentence = "must be 'text' or 'jsonl'."
        raise InvalidInput(f"format: {sentence}", fields={"format": sentence})
    if log_format == "jsonl":
        answer = streaming_response(request, event_lines(template.pk), "application/x-ndjson")
    else:
        answer = streaming_response(
            request, services.log_text(template), "text/plain; charset=utf-8"
        )
    name = f"{template.pk}.{'log' if log_format == 'text' else 'jsonl'}"
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


async def event_lines(template_id: str) -> AsyncGenerator[bytes]:
    """Every event so far, one JSON object per line."""
    async with aclosing(services.all_events(template_id)) as batches:
        async for batch in batches:
            lines = (json.dumps(presenters.event_detail(event)) + "\n" for event in batch)
            yield "".join(lines).encode()


@describe(
    "Show what is in an image",
    notes="Or how it differs from another one.",
    parameters=(COMPARE,),
    answer=ContentsDetail | DifferenceDetail,
    errors=(Conflict,),
    extension=True,
)
@api(scope=READ)
def get_contents(request: ApiRequest, template_id: str) -> HttpResponse:
    """``GET /v1/templates/{id}/contents``; with ``compare=<id>``, the difference from that one."""
    found = contents.contents(request.actor, template_id)
    if other := request.GET.get("compare"):
        difference = contents.compare(found, contents.contents(request.actor, other))
        return json_response(presenters.difference_detail(difference))
    return json_response(presenters.contents_detail(found))


def streaming_response(
    request: HttpRequest, chunks: AsyncIterator[bytes], content_type: str
) -> HttpResponseBase:
    """A response sent as its chunks arrive; for HEAD, only the headers."""
    release_connection()
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    if request.method == "HEAD":
        return HttpResponse(content_type=content_type, headers=headers)
    return OwningStream(chunks, content_type=content_type, headers=headers)
