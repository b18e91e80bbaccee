"""A tool: a service with a description, schemas and hints, and one way of refusing."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, cast

from channels.db import database_sync_to_async
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools.base import Tool
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import ValidationError
from starlette.requests import Request

from orkestr_console.accounts.actor import Actor
from orkestr_console.core.errors import DomainError, Internal, InvalidInput, to_mcp_text
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.json_api import DEEPEST, refuse_unusable
from orkestr_console.http.validation import invalid_input
from orkestr_console.mcp.arguments import flattened

logger = logging.getLogger(__name__)

# What the endpoint puts into the request's scope.
ACTOR = "orkestr.actor"
REQUEST_ID = "orkestr.request_id"
# Where a result has its error as data. Not in the structured content, which has to be what the
# tool's output schema says (MCP, "Tools: Output Schema"): clients that check it throw the whole
# error away (modelcontextprotocol/typescript-sdk, issue 1943).
ERROR = "orkestr/error"
# Arguments that go to a file as they are, and never into a row.
CONTENTS = ("content",)
# How much of a stream one answer holds, in characters: an agent's context is small.
MOST_CHARACTERS = 30_000

Ctx = Context[Any, Request]


class ConsoleTool(Tool):
    """A tool whose errors are ``code: detail``, as REST would answer, and never a stack trace."""

    async def run(
        self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False
    ) -> Any:
        """Call it. What goes wrong is a result that says so."""
        try:
            refuse_unknown(arguments, self.parameters.get("properties", {}))
            refuse_unstorable(arguments)
            return await super().run(arguments, context, convert_result)
        except InvalidInput as error:
            return refused(error)
        except ToolError as error:
            return refused(domain_error(error, context))


def refuse_unknown(arguments: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ``InvalidInput`` for an argument that the tool does not have."""
    for name in arguments:
        if name not in known:
            shown = name if len(name) <= 64 else f"{name[:64]}…"
            raise InvalidInput(
                f"{shown!r} is not an argument of this tool; it takes {', '.join(known) or 'none'}."
            )


def refuse_unstorable(arguments: dict[str, Any]) -> None:
    """Raise ``InvalidInput`` for text that REST would refuse: NUL, half of a surrogate pair."""
    for name, value in arguments.items():
        if name not in CONTENTS:
            refuse_unusable(value, name, DEEPEST)


def domain_error(error: ToolError, context: Context[Any, Any]) -> DomainError:
    """What a failed call means. A defect of ours is logged and says its request's id alone."""
    cause = error.__cause__
    if isinstance(cause, DomainError):
        return cause
    if (away := unavailable(cause)) is not None:
        return away
    if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
        return invalid_input(cause)
    request_id = request_of(context).scope.get(REQUEST_ID, "")
    logger.error("an MCP tool failed [%s]", request_id, exc_info=cause or error)
    detail = f"Something went wrong on our side. Quote {request_id} to your operator."
    return Internal(detail, extra={"request_id": request_id})


def refused(error: DomainError) -> CallToolResult:
    """An error as a tool's result: for the model to read, and as data under ``ERROR``."""
    parts = [to_mcp_text(error)]
    for stream in ("stdout", "stderr"):
        if printed := str(error.extra.get(stream) or ""):
            parts.append(f"{stream}:\n{printed[-MOST_CHARACTERS:]}")
    text = TextContent(type="text", text="\n\n".join(parts))
    return CallToolResult(is_error=True, content=[text], _meta={ERROR: error.to_wire()})


def reading(function: Callable[..., Any], name: str = "") -> ConsoleTool:
    """A tool that changes nothing."""
    hints = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    return tool(function, name, hints)


def writing(
    function: Callable[..., Any],
    name: str = "",
    *,
    destructive: bool = False,
    idempotent: bool = False,
    open_world: bool = False,
) -> ConsoleTool:
    """A tool that changes something; ``open_world``, if it may reach beyond this server."""
    hints = ToolAnnotations(
        read_only_hint=False,
        destructive_hint=destructive,
        idempotent_hint=idempotent,
        open_world_hint=open_world,
    )
    return tool(function, name, hints)


def tool(function: Callable[..., Any], name: str, hints: ToolAnnotations) -> ConsoleTool:
    """A tool of a function; its docstring is what agents read."""
    description = inspect.getdoc(function)
    console_tool = ConsoleTool.from_function(
        function, name=name or None, description=description, annotations=hints
    )
    arguments = flattened(console_tool.fn_metadata.arg_model)
    console_tool.fn_metadata.arg_model = arguments
    console_tool.parameters = arguments.model_json_schema()
    return cast("ConsoleTool", console_tool)


def request_of(context: Context[Any, Any]) -> Request:
    """The HTTP request that a call came by."""
    request = context.request_context.request
    assert isinstance(request, Request)
    return request


def actor_of(context: Context[Any, Any]) -> Actor:
    """Who is calling: each request brings its own token."""
    actor: Actor = request_of(context).scope[ACTOR]
    return actor


async def ask[**P, R](service: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a service, which is sync, in the request's own thread."""
    return await database_sync_to_async(service)(*args, **kwargs)
