"""The tools for sandboxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from orkestr_console.accounts.actor import READ
from orkestr_console.mcp.arguments import Brief, Without
from orkestr_console.mcp.lists import Row, fitting, live_first
from orkestr_console.mcp.results import (
    Egress,
    LimitsDetail,
    Preview,
    Rows,
    SandboxDetail,
    sandbox_detail,
    sandbox_row,
)
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import Ctx, actor_of, call_service, read_tool, write_tool
from orkestr_console.mcp.using import SandboxId, Use, life, life_of, using
from sandboxes_app import presenters, services
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import SandboxSpec, TimeoutSpec
from templates_app import services as templates

# What the public API's SDK can send, and this server accepts with its default only.
SandboxArguments = Annotated[
    SandboxSpec,
    Without("region"),
    Brief(
        template="A base or a ready template.",
        snapshot="Instead of template.",
        size="1 vCPU and 1 GB, 2 and 4, 4 and 8.",
        network="Default off, or the snapshot's. restricted: package registries and the default "
        "list.",
        timeout_seconds="",
        on_timeout="",
        auto_resume="Whether calls resume it while paused.",
        preview_auth="Whether previews need the token in get_preview_url's address.",
        env="",
        volume="A name: storage at /persist that outlives it.",
        metadata="Labels; 'name' names it.",
        allow_domains="Instead of the default list.",
    ),
]


async def create_sandbox(ctx: Ctx, spec: SandboxArguments) -> SandboxDetail:
    """Start a sandbox, an isolated Linux container, from a template or a snapshot."""
    actor = actor_of(ctx)
    if spec.template:
        template = await call_service(templates.source_name, actor, spec.template)
        spec = spec.model_copy(update={"template": template})
    return await described(await call_service(services.create_sandbox, actor, spec))


async def described(sandbox: Sandbox) -> SandboxDetail:
    """A sandbox as it is now."""
    return sandbox_detail(sandbox, await life_of(sandbox))


async def list_sandboxes(
    ctx: Ctx,
    status: Annotated[str | None, Field(description="")] = None,
    metadata: Annotated[dict[str, str] | None, Field(description="Labels.")] = None,
    limit: Limit = None,
    cursor: Cursor = None,
) -> Rows:
    """List sandboxes: live ones first, then those that ended, each newest first."""
    actor = actor_of(ctx)

    async def read_page(
        live: bool,
        count: int,
        after: str | None,
    ) -> tuple[list[Sandbox], str | None]:
        return await call_service(
            services.list_sandboxes,
            actor,
            status=status,
            metadata=metadata,
            live=live,
            limit=count,
            cursor=after,
        )

    async def describe(sandboxes: list[Sandbox]) -> list[Row]:
        reasons: dict[str, str] = {}
        if any(sandbox.state.is_terminal for sandbox in sandboxes):
            reasons = await call_service(services.end_reasons, sandboxes)
        return [sandbox_row(one, life(one, reasons.get(one.pk, ""))) for one in sandboxes]

    rows, next_cursor = await live_first(read_page, describe, limit, cursor)
    return Rows.model_validate({"sandboxes": rows, "next_cursor": next_cursor})


async def get_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Get one sandbox: how it is, how long it has left, why it ended."""
    return await described(await call_service(services.find_named, actor_of(ctx), sandbox_id))


async def set_sandbox_timeout(ctx: Ctx, sandbox_id: SandboxId, spec: TimeoutSpec) -> SandboxDetail:
    """Change when a running sandbox expires, counted from now."""
    async with using(ctx, sandbox_id) as use:
        await call_service(services.set_timeout, use.actor, use.id, spec)
        return await now(ctx, use)


async def now(ctx: Ctx, use: Use) -> SandboxDetail:
    """A sandbox as it is after a change."""
    return await described(await call_service(services.get_sandbox, actor_of(ctx), use.id))


async def pause_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Pause a sandbox: processes, memory and files stay. It doesn't count as running, ends after a
    week, and doesn't survive a restart of the server."""
    async with using(ctx, sandbox_id) as use:
        return await described(await call_service(services.pause_sandbox, use.actor, use.id))


async def resume_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """Resume a paused sandbox; its full timeout starts again."""
    async with using(ctx, sandbox_id) as use:
        return await described(await call_service(services.resume_sandbox, use.actor, use.id))


async def terminate_sandbox(ctx: Ctx, sandbox_id: SandboxId) -> SandboxDetail:
    """End a sandbox and delete its files."""
    async with using(ctx, sandbox_id) as use:
        await call_service(services.terminate_sandbox, use.actor, use.id)
        return await now(ctx, use)


async def get_preview_url(
    ctx: Ctx, sandbox_id: SandboxId, port: Annotated[int, Field(description="")]
) -> Preview:
    """Get the address at which a server in a sandbox is seen in a browser."""
    async with using(ctx, sandbox_id) as use:
        host = await call_service(services.get_preview_host, use.actor, use.id, port)
        sandbox = await call_service(services.get_sandbox, actor_of(ctx), use.id)
        token = services.shown_token(use.actor, sandbox)
        url = services.preview_address(sandbox, host, token)
        return Preview(url=url, sandbox=await life_of(sandbox))


async def get_egress(ctx: Ctx, sandbox_id: SandboxId) -> Egress:
    """Get a sandbox's network policy and the hosts it contacted, refused ones first."""
    async with using(ctx, sandbox_id) as use:
        hosts = await call_service(services.list_egress, use.actor, use.id)
        sandbox = await call_service(services.get_sandbox, actor_of(ctx), use.id)
        found = [egress_row(host) for host in presenters.egress_hosts(hosts)["hosts"]]
        refused = any("refused" in host for host in found)
        hint = "It can't be changed: create another sandbox with allow_domains or network."
        return Egress(
            network=sandbox.network,
            allow_domains=sandbox.allow_domains,
            hosts=fitting(found),
            hint=hint if refused else None,
            sandbox=await life_of(sandbox),
        )


def egress_row(host: Mapping[str, Any]) -> dict[str, Any]:
    """A host that a sandbox contacted, with what there is to be said of it."""
    shown = ("host", "port", "allowed", "refused", "unreached", "reason", "message")
    return {name: host[name] for name in shown if host[name]}


async def get_sandbox_limits(ctx: Ctx) -> LimitsDetail:
    """Get the team's limits and what is used of them."""
    actor = actor_of(ctx)
    actor.require(READ)
    limits = presenters.limits_detail(await call_service(services.limits, actor))
    used = (await call_service(services.usage_counts, [actor.team]))[actor.team.pk]
    used |= (await call_service(templates.usage_counts, [actor.team]))[actor.team.pk]
    return LimitsDetail.model_validate({**limits, "sizes": sizes(limits), "use": use(limits, used)})


def sizes(limits: Mapping[str, Any]) -> list[str]:
    """The sizes that a sandbox can have."""
    allowed = [size for size in limits["sizes"] if size["allowed"]]
    return [f"{one['size']}: {one['cpu']:g} vCPU, {one['memory_mb']} MB" for one in allowed]


def use(limits: Mapping[str, Any], used: dict[str, int]) -> dict[str, Any]:
    """Each limit on a number of things, with how many there are."""
    counted = {
        "running_sandboxes": ("max_concurrent", "max_concurrent_sandboxes"),
        "paused_sandboxes": ("max_snapshots", "max_snapshots"),
        "running_commands": ("max_concurrent_commands", "max_concurrent_commands"),
        "templates": ("max_templates", "max_templates"),
        "builds": ("max_concurrent_builds", "max_concurrent_builds"),
        "snapshots": ("max_named_snapshots", "max_named_snapshots"),
    }
    return {
        name: {"used": used.get(key), "max": limits[limit]}
        for name, (limit, key) in counted.items()
    }


TOOLS = [
    write_tool(create_sandbox, open_world=True),
    read_tool(list_sandboxes),
    read_tool(get_sandbox),
    write_tool(set_sandbox_timeout, idempotent=True),
    write_tool(pause_sandbox),
    write_tool(resume_sandbox),
    write_tool(terminate_sandbox, destructive=True, idempotent=True),
    read_tool(get_preview_url),
    read_tool(get_egress),
    read_tool(get_sandbox_limits),
]
