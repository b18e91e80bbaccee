"""The tools for templates."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import Field

from orkestr_console.accounts.actor import READ
from orkestr_console.core.ids import is_id
from orkestr_console.http.paging import MAX_LIMIT, cursor_after
from orkestr_console.mcp.arguments import Brief, Without
from orkestr_console.mcp.lists import Row, fitting, live_first
from orkestr_console.mcp.progress import Progress
from orkestr_console.mcp.results import (
    Done,
    LogPart,
    Rows,
    TemplateDetail,
    template_detail,
    template_row,
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

TemplateId = Annotated[str, Field(description="")]
Limit = Annotated[int | None, Field(ge=1, le=MAX_LIMIT, description="")]
Cursor = Annotated[str | None, Field(description="")]
ReuseFailed = Annotated[
    bool, Field(description="Skip equal first steps that a failed build completed.")
]
TemplateArguments = Annotated[
    TemplateSpec,
    Without("reuse"),
    Brief(
        name="",
        base_template="A base, or a ready template.",
        recipe="Shell steps as root, each in a new shell. /workspace and /tmp are not kept.",
        network="restricted: package registries and the default list.",
        allow_domains="Instead of the default list; '@default' includes it.",
        env="Baked in, for steps and sandboxes. No secrets.",
        step_timeout_seconds="",
        build_timeout_seconds="",
        disk_mb="",
    ),
]


async def resolved(ctx: Ctx, reference: str) -> str:
    """The id of the template with an id or a name."""
    if is_id("tmpl", reference):
        return reference
    return await call_service(services.template_id, actor_of(ctx), reference)


async def list_base_templates(ctx: Ctx) -> Rows:
    """List what a template or sandbox can start from: built-in bases and the team's templates."""
    actor = actor_of(ctx)
    actor.require(READ)
    bases = await call_service(services.list_bases, actor)
    rows = fitting(base_row(base) for base in bases)
    missing = len(bases) - len(rows)
    hint = f"{missing} more templates: see list_templates or find_templates." if missing else None
    return Rows.model_validate({"bases": rows, "hint": hint})


def base_row(base: services.BaseChoice) -> dict[str, Any]:
    """What can be started from; ``available`` and its state are only said if it isn't ready."""
    row: dict[str, Any] = {
        "id": base.id,
        "title": base.title,
        "description": base.description,
        "kind": "builtin" if base.group == "builtin" else "template",
    }
    if not base.available:
        row["available"] = False
    if state := base.on_request and base.state_text:
        row["state"] = state
    return row


async def create_template(
    ctx: Ctx, spec: TemplateArguments, reuse_failed: ReuseFailed = False
) -> TemplateDetail:
    """Build a template: an image with your dependencies, from a base and shell steps. Returns at
    once; call wait_for_template next. A template never changes: build another and delete the old
    one."""
    base = await call_service(services.source_name, actor_of(ctx), spec.base_template)
    reuse = {"reuse": "failed"} if reuse_failed else {}
    spec = spec.model_copy(update={"base_template": base, **reuse})
    template = await call_service(services.create_template, actor_of(ctx), spec)
    return await call_service(template_detail, template)


async def list_templates(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> Rows:
    """List the team's templates: ready and building ones first, then failed ones."""
    actor = actor_of(ctx)

    async def read_page(
        live: bool,
        count: int,
        after: str | None,
    ) -> tuple[list[Template], str | None]:
        return await call_service(
            services.list_templates, actor, failed=not live, limit=count, cursor=after
        )

    async def describe(templates: list[Template]) -> list[Row]:
        return [template_row(template) for template in templates]

    rows, next_cursor = await live_first(read_page, describe, limit, cursor)
    return Rows.model_validate({"templates": rows, "next_cursor": next_cursor})


async def find_templates(
    ctx: Ctx,
    package: Annotated[str, Field(description="Of pip, npm or Debian.")],
    cursor: Cursor = None,
) -> Rows:
    """Find ready templates that have a package, with its version."""
    found, next_cursor = await call_service(
        services.find_templates, actor_of(ctx), package, cursor=cursor
    )
    rows = fitting(found_row(one) for one in found)
    if len(rows) < len(found):
        next_cursor = cursor_after(found[len(rows) - 1].template)
    hint = None if rows else "None of them has it. Build one with create_template."
    return Rows.model_validate({"templates": rows, "next_cursor": next_cursor, "hint": hint})


def found_row(found: services.Found) -> dict[str, Any]:
    """A template that has a package."""
    packages = [" ".join(package)[:200] for package in found.packages[:5]]
    return {"id": found.template.pk, "name": found.template.name, "packages": packages}


async def get_template(
    ctx: Ctx,
    template_id: TemplateId,
    recipe_from: Annotated[int, Field(ge=1, description="First step to show.")] = 1,
) -> TemplateDetail:
    """Get one template: status, steps, error, end of its build log."""
    key = await resolved(ctx, template_id)
    template = await call_service(services.get_template, actor_of(ctx), key)
    return await call_service(template_detail, template, recipe_from)


async def get_template_log(
    ctx: Ctx,
    template_id: TemplateId,
    offset: Annotated[int, Field(ge=0, description="In characters.")] = 0,
    limit: Annotated[int, Field(ge=1, le=MAX_CHARACTERS, description="")] = MAX_CHARACTERS,
) -> LogPart:
    """Read the build log in parts, also while it is building."""
    key = await resolved(ctx, template_id)
    template = await call_service(services.get_template, actor_of(ctx), key)
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
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_WAIT, description="")] = DEFAULT_WAIT,
) -> TemplateDetail:
    """Wait until a template is ready or failed. If it is still building then, call this again."""
    actor = actor_of(ctx)
    key = await resolved(ctx, template_id)
    template = await call_service(services.get_template, actor, key)
    try:
        async with asyncio.timeout(timeout_seconds):
            await report_progress(ctx, template.pk, len(template.recipe))
    except TimeoutError:
        pass
    template = await call_service(services.get_template, actor, key)
    return await call_service(template_detail, template)


async def report_progress(ctx: Ctx, template_id: str, steps: int) -> None:
    """Report each step as the build reaches it; return when the build has finished."""
    progress = Progress(ctx, steps + 1)
    async with progress.alive(), aclosing(services.follow_events(template_id)) as batches:
        async for batch in batches:
            for event in batch:
                at, message = progress_of(event, steps)
                if event.kind in IMAGE_PHASES:
                    # The total is unknown, so move on by a part of what is left.
                    await progress.creep(message, steps + 0.95)
                await progress.report(at, message)


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
    """Cancel a build; its status is then 'failed'."""
    key = await resolved(ctx, template_id)
    template = await call_service(services.cancel_template, actor_of(ctx), key)
    return await call_service(template_detail, template)


async def delete_template(ctx: Ctx, template_id: TemplateId) -> Done:
    """Delete a template for good, or cancel its build. Running sandboxes keep working."""
    key = await resolved(ctx, template_id)
    await call_service(services.delete_template, actor_of(ctx), key)
    return Done(id=key, done="Template deleted.")


TOOLS = [
    read_tool(list_base_templates),
    write_tool(create_template, open_world=True),
    read_tool(list_templates),
    read_tool(find_templates),
    read_tool(get_template),
    read_tool(get_template_log),
    read_tool(wait_for_template, reports=True),
    write_tool(cancel_template, destructive=True, idempotent=True),
    write_tool(delete_template, destructive=True),
]
