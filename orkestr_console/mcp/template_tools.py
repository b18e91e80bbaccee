"""The tools for templates."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

from pydantic import Field

from orkestr_console.accounts.actor import READ
from orkestr_console.http.paging import DEFAULT_LIMIT, MAX_LIMIT
from orkestr_console.mcp.arguments import Without
from orkestr_console.mcp.results import (
    BaseTemplate,
    BaseTemplates,
    Done,
    LogPart,
    TemplateDetail,
    TemplatePage,
    template_detail,
    template_summary,
)
from orkestr_console.mcp.tool import (
    MAX_CHARACTERS,
    Ctx,
    actor_of,
    call_service,
    read_tool,
    write_tool,
)
from templates_app import services
from templates_app.models import Template
from templates_app.services import Event, timing
from templates_app.specs import TemplateSpec

# In seconds. The default is below the minute after which many clients time out.
DEFAULT_WAIT, MAX_WAIT = 50, 3600
# The events between a build's last step and its end.
IMAGE_PHASES = ("progress", "capture")

TemplateId = Annotated[str, Field(description="A template's id, such as 'tmpl_01J…'.")]
Limit = Annotated[
    int | None,
    Field(ge=1, le=MAX_LIMIT, description=f"Maximum number; {DEFAULT_LIMIT} by default."),
]
Cursor = Annotated[str | None, Field(description="next_cursor of the previous page.")]
ReuseFailed = Annotated[
    bool,
    Field(
        description="Skip the steps that an earlier failed or cancelled build completed, if "
        "base, network and steps are the same up to there."
    ),
]


async def list_base_templates(ctx: Ctx) -> BaseTemplates:
    """List what a template or a sandbox can start from: built-in bases and the team's templates.

    Call this before create_template or create_sandbox if you don't know the names.
    """
    actor = actor_of(ctx)
    actor.require(READ)
    bases = await call_service(services.list_bases, actor)
    return BaseTemplates(
        bases=[
            BaseTemplate(
                id=base.id,
                title=base.title,
                description=base.description,
                kind="builtin" if base.group == "builtin" else "template",
                available=base.available,
            )
            for base in bases
        ]
    )


async def create_template(
    ctx: Ctx, spec: Annotated[TemplateSpec, Without("reuse")], reuse_failed: ReuseFailed = False
) -> TemplateDetail:
    """Build a template: an image with your dependencies installed, from a base and shell steps.

    Returns immediately with status 'building'; call wait_for_template next. Pin versions. A
    template never changes: to update one, build another and delete the old one.
    """
    if reuse_failed:
        spec = spec.model_copy(update={"reuse": "failed"})
    template = await call_service(services.create_template, actor_of(ctx), spec)
    return await call_service(template_detail, template)


async def list_templates(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> TemplatePage:
    """List the team's templates, newest first, with their status."""
    actor = actor_of(ctx)
    rows, next_cursor = await call_service(
        services.list_templates, actor, limit=limit, cursor=cursor
    )
    return TemplatePage(templates=[template_summary(row) for row in rows], next_cursor=next_cursor)


async def get_template(
    ctx: Ctx,
    template_id: TemplateId,
    recipe_from: Annotated[
        int, Field(ge=1, description="For a long recipe, the number of the first step to show.")
    ] = 1,
) -> TemplateDetail:
    """Get one template: its status, its steps, its error and the end of its build log."""
    template = await call_service(services.get_template, actor_of(ctx), template_id)
    return await call_service(template_detail, template, recipe_from)


async def get_template_log(
    ctx: Ctx,
    template_id: TemplateId,
    offset: Annotated[int, Field(ge=0, description="Offset to start from, in characters.")] = 0,
    limit: Annotated[
        int, Field(ge=1, le=MAX_CHARACTERS, description="Maximum number of characters.")
    ] = MAX_CHARACTERS,
) -> LogPart:
    """Read the full build log in parts. Works while the template is still building."""
    template = await call_service(services.get_template, actor_of(ctx), template_id)
    return await read_log(template, offset, limit)


async def read_log(template: Template, offset: int, limit: int) -> LogPart:
    """At most ``limit`` characters of the log, from ``offset`` on."""
    position, part = 0, ""
    async with aclosing(services.log_text(template)) as chunks:
        async for chunk in chunks:
            text = chunk.decode()
            part += text[max(offset - position, 0) :][: limit + 1 - len(part)]
            position += len(text)
            if len(part) > limit:
                return LogPart(text=part[:limit], offset=offset, next_offset=offset + limit)
    return LogPart(text=part, offset=offset, next_offset=None)


async def wait_for_template(
    ctx: Ctx,
    template_id: TemplateId,
    timeout_seconds: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_WAIT,
            description="Seconds to wait before returning, even if it is still building.",
        ),
    ] = DEFAULT_WAIT,
) -> TemplateDetail:
    """Wait until a template is ready or failed, with a progress notification for each step.

    If the timeout comes first, the status is still 'building': call this again. The build continues
    whether or not anyone waits.
    """
    actor = actor_of(ctx)
    template = await call_service(services.get_template, actor, template_id)
    try:
        async with asyncio.timeout(timeout_seconds):
            await report_progress(ctx, template.pk, len(template.recipe))
    except TimeoutError:
        pass
    template = await call_service(services.get_template, actor, template_id)
    return await call_service(template_detail, template)


async def report_progress(ctx: Ctx, template_id: str, steps: int) -> None:
    """Report each step as the build reaches it; return when the build has finished."""
    reported = 0.0
    async with aclosing(services.follow_events(template_id)) as batches:
        async for batch in batches:
            for event in batch:
                progress, message = progress_of(event, steps)
                if event.kind in IMAGE_PHASES:
                    # The total is unknown, so move on by a part of what is left.
                    progress = max(progress, reported + (steps + 0.95 - reported) / 100)
                # Progress must increase with each notification (MCP, "Progress").
                if progress > reported:
                    await ctx.report_progress(progress, steps + 1, message)
                    reported = progress


def progress_of(event: Event, steps: int) -> tuple[float, str]:
    """How far the build is, in steps, and a message; 0 for an event that isn't reported."""
    step = event.payload.get("step") or 0
    command = str(event.payload.get("command", "")).partition("\n")[0][:200]
    progress: dict[str, tuple[float, str]] = {
        "boot": (0.1, "The build container is running."),
        "step_started": (step - 0.5, f"Running step {step} of {steps}: {command}"),
        "step_cached": (step, f"Reused step {step} of {steps}: {command}"),
        "step_finished": (step, f"Finished step {step} of {steps}."),
        "capture": (steps + 0.5, "The image has been captured."),
        "progress": (steps, image_progress(event)),
        "published": (steps + 1, "The template is ready."),
    }
    return progress.get(event.kind, (0, ""))


def image_progress(event: Event) -> str:
    """How much of the image has been captured or listed."""
    progress = timing.progress_of(event.payload)
    return f"{progress.label}: {progress.files:,} files, {progress.bytes / 1e6:,.0f} MB so far."


async def cancel_template(ctx: Ctx, template_id: TemplateId) -> TemplateDetail:
    """Cancel a build immediately. The template's status is then 'failed'."""
    template = await call_service(services.cancel_template, actor_of(ctx), template_id)
    return await call_service(template_detail, template)


async def delete_template(ctx: Ctx, template_id: TemplateId) -> Done:
    """Delete a template permanently; this frees its slot and disk. Running sandboxes keep working.

    An unfinished build is cancelled first. This can't be undone.
    """
    await call_service(services.delete_template, actor_of(ctx), template_id)
    return Done(id=template_id, done="Template deleted.")


TOOLS = [
    read_tool(list_base_templates),
    write_tool(create_template, open_world=True),
    read_tool(list_templates),
    read_tool(get_template),
    read_tool(get_template_log),
    read_tool(wait_for_template),
    write_tool(cancel_template, destructive=True, idempotent=True),
    write_tool(delete_template, destructive=True),
]
