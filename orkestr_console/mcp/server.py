"""The MCP server: the tools of templates and sandboxes, resources, prompts."""

from __future__ import annotations

from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp_types import CallToolResult, InputRequiredResult, ListToolsResult

from orkestr_console.accounts.actor import WRITE
from orkestr_console.core.errors import NotFound
from orkestr_console.mcp import sandbox_tools, snapshot_tools, template_tools
from orkestr_console.mcp.resources import add_prompts, add_resources
from orkestr_console.mcp.tool import ACTOR, ConsoleTool, refused

INSTRUCTIONS = """\
Orkestr runs code in isolated Linux sandboxes. A template is an image with dependencies already \
installed: create_template builds one from a base and shell steps, wait_for_template says when it \
is ready, and create_sandbox starts a sandbox from it in milliseconds. In a sandbox, use exec, \
write_file and read_file; snapshot_sandbox keeps its files, to start others from; \
terminate_sandbox when you are done. Errors are 'code: what was wrong and what to do'.\
"""
TOOLS: list[ConsoleTool] = [
    *template_tools.TOOLS,
    *sandbox_tools.TOOLS,
    *snapshot_tools.TOOLS,
]
NAMES = frozenset(tool.name for tool in TOOLS)
READING = frozenset(
    tool.name for tool in TOOLS if tool.annotations and tool.annotations.read_only_hint
)


class ToolServer(MCPServer[Any]):
    """A server that refuses a tool that there is not in the form of every other refusal."""

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Call a tool by its name."""
        if name not in NAMES:
            shown = name if len(name) <= 64 else f"{name[:64]}…"
            return refused(
                NotFound(f"Unknown tool {shown!r}; there are {', '.join(sorted(NAMES))}.")
            )
        return await super().call_tool(name, arguments, context)


def build_server() -> MCPServer[Any]:
    """A server; one for each event loop."""
    server = ToolServer(
        "orkestr",
        title="Orkestr Console",
        instructions=INSTRUCTIONS,
        tools=[*TOOLS],
        middleware=[only_what_may_be_called],
        # Nothing is announced: the lists never change.
        subscriptions=False,
    )
    add_resources(server)
    add_prompts(server)
    return server


async def only_what_may_be_called(
    ctx: ServerRequestContext[Any, Any], call_next: CallNext
) -> HandlerResult:
    """Leave out of the list the tools that the token's scopes do not cover."""
    result = await call_next(ctx)
    request: Any = ctx.request
    if ctx.method != "tools/list" or request.scope[ACTOR].has(WRITE):
        return result
    if isinstance(result, ListToolsResult):
        shown = [tool for tool in result.tools if tool.name in READING]
        return result.model_copy(update={"tools": shown})
    assert isinstance(result, dict)
    return {**result, "tools": [tool for tool in result["tools"] if tool["name"] in READING]}
