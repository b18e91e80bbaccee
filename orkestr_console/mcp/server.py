"""The MCP server: the tools for templates and sandboxes, resources, prompts."""

from __future__ import annotations

from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import CallToolResult, InputRequiredResult, ListToolsResult

from hostruntime import __version__
from orkestr_console.accounts.actor import WRITE
from orkestr_console.core.errors import NotFound
from orkestr_console.mcp import (
    command_tools,
    file_tools,
    interpreter_tools,
    sandbox_tools,
    snapshot_tools,
    template_tools,
    volume_tools,
)
from orkestr_console.mcp.cancelling import cancellable
from orkestr_console.mcp.resources import add_prompts, add_resources
from orkestr_console.mcp.tool import ACTOR, ConsoleTool, error_result

INSTRUCTIONS = """\
Orkestr runs code in isolated Linux sandboxes. A template is an image with dependencies already \
installed: create_template builds one from a base and shell steps, wait_for_template waits until \
it is ready, and create_sandbox starts a sandbox from it in milliseconds. In a sandbox, use exec, \
exec_background for what takes longer than a minute, and the file tools. snapshot_sandbox saves \
its files so that you can start others from them. sandbox_id and template_id take an id or a \
name; a sandbox's name is the label 'name' of its metadata. Paths are absolute; write files under \
/workspace or /tmp. Where an answer has next_offset or next_cursor, pass it on for what follows. \
Each answer says how long the sandbox has left, or why it ended. Call terminate_sandbox when you \
are done. Errors read 'code: what is wrong and what to do'.\
"""
TOOLS: list[ConsoleTool] = [
    *template_tools.TOOLS,
    *sandbox_tools.TOOLS,
    *command_tools.TOOLS,
    *file_tools.TOOLS,
    *interpreter_tools.TOOLS,
    *snapshot_tools.TOOLS,
    *volume_tools.TOOLS,
]
TOOL_NAMES = frozenset(tool.name for tool in TOOLS)
READ_ONLY_NAMES = frozenset(
    tool.name for tool in TOOLS if tool.annotations and tool.annotations.read_only_hint
)


class ToolServer(MCPServer[Any]):
    """A server that reports an unknown tool in the form of every other error."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool by name."""
        if name not in TOOL_NAMES:
            shown = name if len(name) <= 64 else f"{name[:64]}…"
            return error_result(
                NotFound(f"Unknown tool {shown!r}. The tools are {', '.join(sorted(TOOL_NAMES))}.")
            )
        return await super().call_tool(name, arguments, context)


def build_server() -> MCPServer[Any]:
    """A server for one event loop."""
    server = ToolServer(
        "orkestr",
        title="Orkestr Console",
        version=__version__,
        instructions=INSTRUCTIONS,
        tools=[*TOOLS],
        middleware=[cancellable, hide_unauthorized_tools],
        # No change notifications: the lists never change.
        subscriptions=False,
    )
    add_resources(server)
    add_prompts(server)
    return server


async def hide_unauthorized_tools(
    ctx: ServerRequestContext[Any, Any], call_next: CallNext
) -> HandlerResult:
    """Leave out of the list the tools that the token's scopes don't cover."""
    result = await call_next(ctx)
    request: Any = ctx.request
    if ctx.method != "tools/list" or request.scope[ACTOR].has(WRITE):
        return result
    if isinstance(result, ListToolsResult):
        shown = [tool for tool in result.tools if tool.name in READ_ONLY_NAMES]
        return result.model_copy(update={"tools": shown})
    assert isinstance(result, dict)
    return {
        **result,
        "tools": [tool for tool in result["tools"] if tool["name"] in READ_ONLY_NAMES],
    }
