"""The tools for templates."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated

from pydantic import Field

from orkestr_console.accounts.actor import READ
from orkestr_console.http.paging import HIGHEST_LIMIT, USUAL_LIMIT
from orkestr_console.mcp.answers import (
    BaseAnswer,
    Bases,
    Done,
    LogPart,
    TemplateAnswer,
    Templates,
    template_answer,
    template_line,
)
from orkestr_console.mcp.arguments import Without
from orkestr_console.mcp.tool import MOST_CHARACTERS, Ctx, actor_of, ask, reading, writing
from templates_app import services
from templates_app.models import Template
from templates_app.services import Told, timing
from templates_app.specs import TemplateSpec

# Under the minute after which many clients give up on a call that says nothing.
USUAL_WAIT, LONGEST_WAIT = 50, 3600
# What a build tells between its last step and its end.
MAKING = ("progress", "capture")

TemplateId = Annotated[str, Field(description="A template's id, such as 'tmpl_01J…'.")]
Limit = Annotated[
    int | None,
    Field(ge=1, le=HIGHEST_LIMIT, description=f"Maximum number; {USUAL_LIMIT} by default."),
]
Cursor = Annotated[str | None, Field(description="next_cursor of the previous page.")]
ReuseFailed = Annotated[
    bool,
    Field(
        description="Skip the steps that an earlier failed or cancelled build completed, if "
        "base, network and steps are the same up to there."
    ),
]


async def list_base_templates(ctx: Ctx) -> Bases:
    """List what a template or a sandbox can start from: built-in bases and the team's templates.

    Call this before create_template or create_sandbox if you do not know the names.
    """
    actor = actor_of(ctx)
    actor.require(READ)
    found = await ask(services.list_bases, actor)
    return Bases(
        bases=[
            BaseAnswer(
                id=base.id,
                title=base.title,
                description=base.description,
                kind="builtin" if base.group == "builtin" else "template",
                available=base.available,
            )
            for base in found
        ]
    )


async def create_template(
    ctx: Ctx, spec: Annotated[TemplateSpec, Without("reuse")], reuse_failed: ReuseFailed = False
) -> TemplateAnswer:
    """Build a template: an image with your dependencies installed, from a base and shell steps.

    Answers at once with status 'building'; call wait_for_template next. Pin versions. A template
    never changes: to update one, build another and delete the old one.
    """
    if reuse_failed:
        spec = spec.model_copy(update={"reuse": "failed"})
    template = await ask(services.create_template, actor_of(ctx), spec)
    return await ask(template_answer, template)


async def list_templates(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> Templates:
    """List the team's templates, newest first, with their status."""
    actor = actor_of(ctx)
    rows, following = await ask(services.list_templates, actor, limit=limit, cursor=cursor)
    return Templates(templates=[template_line(row) for row in rows], next_cursor=following)


async def get_template(
    ctx: Ctx,
    template_id: TemplateId,
    recipe_from: Annotated[
        int, Field(ge=1, description="For a long recipe, the number of the first step to show.")
    ] = 1,
) -> TemplateAnswer:
    """Look at one template: its status, its steps, its error and the end of its build log."""
    template = await ask(services.get_template, actor_of(ctx), template_id)
    return await ask(template_answer, template, recipe_from)


async def get_template_log(
    ctx: Ctx,
    template_id: TemplateId,
    offset: Annotated[int, Field(ge=0, description="Offset to start from, in characters.")] = 0,
    limit: Annotated[
        int, Field(ge=1, le=MOST_CHARACTERS, description="Maximum number of characters.")
    ] = MOST_CHARACTERS,
) -> LogPart:
    """Read the whole build log, a part at a time. Works while the template is still building."""
    template = await ask(services.get_template, actor_of(ctx), template_id)
    return await log_part(template, offset, limit)


async def log_part(template: Template, offset: int, limit: int) -> LogPart:
    """The characters of the log from ``offset`` on; at most ``limit`` of them."""
    passed, found = 0, ""
    async with aclosing(services.log_text(template)) as pieces:
        async for piece in pieces:
            text = piece.decode()
            found += text[max(offset - passed, 0) :][: limit + 1 - len(found)]
            passed += len(text)
            if len(found) > limit:
                return LogPart(text=found[:limit], offset=offset, next_offset=offset + limit)
    return LogPart(text=found, offset=offset, next_offset=None)


async def wait_for_template(
    ctx: Ctx,
    template_id: TemplateId,
    timeout_seconds: Annotated[
        int,
        Field(
            ge=1,
            le=LONGEST_WAIT,
            description="Seconds to wait before answering, even if it is still building.",
        ),
    ] = USUAL_WAIT,
) -> TemplateAnswer:
    """Wait until a template is ready or failed, with a progress notification for each step.

    If the time is over first, the status is still 'building': call this again. The build goes on
    whether or not anybody waits.
    """
    actor = actor_of(ctx)
    template = await ask(services.get_template, actor, template_id)
    try:
        async with asyncio.timeout(timeout_seconds):
            await report_until_the_end(ctx, template.pk, len(template.recipe))
    except TimeoutError:
        pass
    template = await ask(services.get_template, actor, template_id)
    return await ask(template_answer, template)


async def report_until_the_end(ctx: Ctx, template_id: str, steps: int) -> None:
    """Report each step as the build comes to it; return when the build has ended."""
    reported = 0.0
    async with aclosing(services.follow_events(template_id)) as batches:
        async for batch in batches:
            for told in batch:
                progress, message = progress_of(told, steps)
                if told.kind in MAKING:
                    # How much is still to come nobody knows: a little further, never to the end.
                    progress = max(progress, reported + (steps + 0.95 - reported) / 100)
                # Each must be more than the one before (MCP, "Progress").
                if progress > reported:
                    await ctx.report_progress(progress, steps + 1, message)
                    reported = progress


def progress_of(told: Told, steps: int) -> tuple[float, str]:
    """How far a build is with an event, in steps, and what to say; 0 for one not worth a word."""
    step = told.payload.get("step") or 0
    command = str(told.payload.get("command", "")).partition("\n")[0][:200]
    said: dict[str, tuple[float, str]] = {
        "boot": (0.1, "The build container is running."),
        "step_started": (step - 0.5, f"Step {step} of {steps} runs: {command}"),
        "step_cached": (step, f"Step {step} of {steps} is reused: {command}"),
        "step_finished": (step, f"Step {step} of {steps} has ended."),
        "capture": (steps + 0.5, "The image is captured."),
        "progress": (steps, made(told)),
        "published": (steps + 1, "The template is ready."),
    }
    return said.get(told.kind, (0, ""))


def made(told: Told) -> str:
    """How far the image is."""
    progress = timing.progress_of(told.payload)
    return f"{progress.label}: {progress.files:,} files, {progress.bytes / 1e6:,.0f} MB so far."


async def cancel_template(ctx: Ctx, template_id: TemplateId) -> TemplateAnswer:
    """End a build that you no longer want, at once. The template is then 'failed'."""
    template = await ask(services.cancel_template, actor_of(ctx), template_id)
    return await ask(template_answer, template)


async def delete_template(ctx: Ctx, template_id: TemplateId) -> Done:
    """Delete a template for good; this frees its slot and its disk. Running sandboxes keep working.

    A build that has not ended is cancelled first. This cannot be undone.
    """
    await ask(services.delete_template, actor_of(ctx), template_id)
    return Done(id=template_id, done="Template deleted.")


TOOLS = [
    reading(list_base_templates),
    writing(create_template, open_world=True),
    reading(list_templates),
    reading(get_template),
    reading(get_template_log),
    reading(wait_for_template),
    writing(cancel_template, destructive=True, idempotent=True),
    writing(delete_template, destructive=True),
]
