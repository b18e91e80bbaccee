"""Tools: a service with a description, schemas and hints, and one form for errors."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

from channels.db import database_sync_to_async
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools.base import Tool
from mcp_types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import Asleep, DomainError, Internal, InvalidInput, to_mcp_text
from orkestr_console.core.hosts import Service
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.json_api import MAX_DEPTH, reject_unusable
from orkestr_console.http.steps import run_in_threads
from orkestr_console.http.validation import invalid_input
from orkestr_console.http.waking import call_again
from orkestr_console.mcp.arguments import flattened
from orkestr_console.mcp.progress import heartbeat
from orkestr_console.mcp.schema import compact, input_schema

logger = logging.getLogger(__name__)

# Keys that the endpoint adds to the request's scope.
ACTOR = "orkestr.actor"
REQUEST_ID = "orkestr.request_id"
# The key of a result's _meta that holds its error as data. It can't be in the structured content,
# which has to match the tool's output schema (MCP, "Tools: Output Schema"): clients that validate
# it would drop the whole error (modelcontextprotocol/typescript-sdk, issue 1943).
ERROR = "orkestr/error"
# Arguments that are written to a file unchanged, and never to a row.
UNSTORED = ("content", "files", "old", "new")
# The most text that a result has of one stream: an agent's context is small.
MAX_CHARACTERS = 30_000

Ctx = Context[Any, Request]


class ConsoleTool(Tool):
    """A tool whose errors are ``code: detail``, as in REST, and never a stack trace."""

    # Whether it reports its progress by itself.
    reports: bool = False

    async def run(
        self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False
    ) -> Any:
        """Call the tool. Errors are results, not exceptions."""
        try:
            refuse_unknown(arguments, self.parameters.get("properties", {}))
            refuse_unstorable(arguments)
            async with nullcontext() if self.reports else heartbeat(context):
                answer = await super().run(arguments, context)
            return answer if isinstance(answer, CallToolResult) else result(answer)
        except InvalidInput as error:
            return error_result(error)
        except ToolError as error:
            return error_result(domain_error(error, context))


def result(answer: BaseModel, *before: ImageContent) -> CallToolResult:
    """An answer as data, and the same as text for the model; pictures come before it."""
    fields = answer.model_dump(mode="json")
    text = TextContent(type="text", text=compact(fields))
    return CallToolResult(content=[*before, text], structured_content=fields)


def refuse_unknown(arguments: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ``InvalidInput`` for an argument that the tool doesn't have."""
    for name in arguments:
        if name not in known:
            shown = name if len(name) <= 64 else f"{name[:64]}…"
            raise InvalidInput(
                f"{shown!r} is not an argument of this tool; it takes {', '.join(known) or 'none'}."
            )


def refuse_unstorable(arguments: dict[str, Any]) -> None:
    """Raise ``InvalidInput`` for text that REST refuses: NUL, half of a surrogate pair."""
    for name, value in arguments.items():
        if name not in UNSTORED:
            reject_unusable(value, name, MAX_DEPTH)


def domain_error(error: ToolError, context: Context[Any, Any]) -> DomainError:
    """The domain error behind a failed call. A bug is logged, and reported by request id only."""
    cause = error.__cause__
    if isinstance(cause, DomainError):
        return cause
    if (outage := unavailable(cause)) is not None:
        return outage
    if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
        return invalid_input(cause)
    request_id = request_of(context).scope.get(REQUEST_ID, "")
    logger.error("an MCP tool failed [%s]", request_id, exc_info=cause or error)
    detail = f"Something went wrong on our side. Quote {request_id} to your operator."
    return Internal(detail, extra={"request_id": request_id})


def error_result(error: DomainError) -> CallToolResult:
    """An error as a tool's result: as text for the model, and as data under ``ERROR``."""
    parts = [to_mcp_text(error)]
    for stream in ("stdout", "stderr"):
        if output := str(error.extra.get(stream) or ""):
            parts.append(f"{stream}:\n{output[-MAX_CHARACTERS:]}")
    if sandbox := error.extra.get("sandbox"):
        parts.append(f"sandbox: {sandbox}")
    text = TextContent(type="text", text="\n\n".join(parts))
    return CallToolResult(is_error=True, content=[text], _meta={ERROR: error.to_wire()})


def read_tool(
    function: Callable[..., Any], name: str = "", *, reports: bool = False
) -> ConsoleTool:
    """A tool that changes nothing; one that ``reports`` does so while it works."""
    hints = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    return tool(function, name, hints, reports=reports)


def write_tool(
    function: Callable[..., Any],
    name: str = "",
    *,
    destructive: bool = False,
    idempotent: bool = False,
    open_world: bool = False,
) -> ConsoleTool:
    """A tool that changes something; ``open_world`` if it can reach beyond this server.

    Hints that are as the protocol takes them to be anyway are left out.
    """
    hints = ToolAnnotations(
        destructive_hint=destructive,
        idempotent_hint=True if idempotent else None,
        open_world_hint=None if open_world else False,
    )
    return tool(function, name, hints)


def tool(
    function: Callable[..., Any], name: str, hints: ToolAnnotations, *, reports: bool = False
) -> ConsoleTool:
    """A tool that calls a function; agents read the function's docstring.

    It has no output schema: those were more than half of what an agent has to read of its tools.
    """
    description = " ".join((inspect.getdoc(function) or "").split())
    console_tool = cast(
        "ConsoleTool",
        ConsoleTool.from_function(
            function,
            name=name or None,
            description=description,
            annotations=hints,
            structured_output=False,
        ),
    )
    arguments = flattened(console_tool.fn_metadata.arg_model)
    console_tool.fn_metadata.arg_model = arguments
    console_tool.parameters = input_schema(arguments.model_json_schema())
    console_tool.reports = reports
    return console_tool


def request_of(context: Context[Any, Any]) -> Request:
    """The HTTP request that carries a call."""
    request = context.request_context.request
    assert isinstance(request, Request)
    return request


def actor_of(context: Context[Any, Any]) -> Actor:
    """Who is calling: each request brings its own token."""
    actor: Actor = request_of(context).scope[ACTOR]
    return actor


async def call_service[**P, R](service: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a service in threads; one in steps holds none while the host works."""
    if isinstance(service, Service):
        return await awake(lambda: run_in_threads(service.steps(*args, **kwargs)))
    return await awake(partial(database_sync_to_async(service), *args, **kwargs))


async def awake[R](call: Callable[[], Awaitable[R]]) -> R:
    """Call something, and again once what it finds asleep has been woken."""
    try:
        return await call()
    except Asleep as asleep:
        return await call_again(asleep, call)
