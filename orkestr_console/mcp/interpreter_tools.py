"""The tool for running code in a sandbox's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent

from orkestr_console.http.steps import to_its_end
from orkestr_console.mcp.arguments import Brief, Default, Without
from orkestr_console.mcp.command_tools import DEFAULT_SECONDS
from orkestr_console.mcp.output import TruncatedOutput
from orkestr_console.mcp.results import CodeRun
from orkestr_console.mcp.tool import MAX_CHARACTERS, Ctx, call_service, write_tool
from orkestr_console.mcp.using import SandboxId, using
from sandboxes_app import services
from sandboxes_app.specs import CodeSpec

# An agent's context is small, and pictures are large.
MAX_IMAGES, MAX_IMAGE_CHARACTERS = 4, 1024 * 1024

CodeArguments = Annotated[
    CodeSpec,
    Without("stream"),
    Default(timeout_seconds=DEFAULT_SECONDS),
    Brief(code="", language="", context_id="", timeout_seconds=""),
]


async def run_code(ctx: Ctx, sandbox_id: SandboxId, spec: CodeArguments) -> CallToolResult:
    """Run code in a Jupyter kernel, which keeps variables; needs ipykernel in the image."""
    async with using(ctx, sandbox_id) as use:
        run = await call_service(services.prepare_code, use.actor, use.id, spec)
        outcome = await services.run_code(run)
        answer = await to_its_end(call_service(services.conclude_code, run, outcome))
        return code_run(answer, await use.life())


def code_run(answer: services.CodeAnswer, life: str) -> CallToolResult:
    """What came of a run; figures are images."""
    text = TruncatedOutput(MAX_CHARACTERS)
    text.feed("\n".join(parts(answer)).encode())
    output = text.text() or "(no output)"
    ran = CodeRun(
        output=output,
        context_id=answer.last.context_id,
        duration_ms=answer.last.duration_ms,
        sandbox=life,
    )
    content: list[ContentBlock] = [TextContent(type="text", text=output), *images(answer)]
    return CallToolResult(
        content=content,
        structured_content=ran.model_dump(mode="json"),
        is_error=answer.error is not None,
    )


def parts(answer: services.CodeAnswer) -> Iterator[str]:
    """What came of a run, as text."""
    for stream in ("stdout", "stderr"):
        if printed := answer.printed(stream):
            yield f"{stream}:\n{printed}"
    for frame in answer.frames:
        if frame.result is not None and frame.result.text is not None:
            yield frame.result.text
    if (error := answer.error) is not None:
        yield "\n".join([*error.traceback, f"{error.name}: {error.value}"])
    if answer.last.interrupted:
        yield "The code was interrupted at its timeout."
    if answer.last.restarted:
        yield "The kernel had ended and was started anew: earlier variables are gone."
    if answer.last.truncated:
        yield f"Cut, as it was too long: {', '.join(answer.last.truncated)}."


def images(answer: services.CodeAnswer) -> Iterator[ImageContent]:
    """The pictures of a run, as far as they are for an agent."""
    found = [each.result.png for each in answer.frames if each.result is not None]
    small = [png for png in found if png is not None and len(png) <= MAX_IMAGE_CHARACTERS]
    for png in small[:MAX_IMAGES]:
        yield ImageContent(type="image", data=png, mime_type="image/png")


TOOLS = [write_tool(run_code, destructive=True, open_world=True)]
