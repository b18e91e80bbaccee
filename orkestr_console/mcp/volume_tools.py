"""The tools for volumes, which create_sandbox creates."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orkestr_console.mcp.lists import fitting
from orkestr_console.mcp.results import Done, Rows, volume_row
from orkestr_console.mcp.tool import Ctx, actor_of, call_service, read_tool, write_tool
from sandboxes_app import services


async def list_volumes(ctx: Ctx) -> Rows:
    """List the team's volumes, newest first: storage that create_sandbox mounts at /persist."""
    volumes = await call_service(services.list_volumes, actor_of(ctx))
    shown = fitting(volume_row(volume) for volume in volumes)
    hint = None if len(shown) == len(volumes) else f"{len(volumes) - len(shown)} more"
    return Rows.model_validate({"volumes": shown, "hint": hint})


async def delete_volume(
    ctx: Ctx, volume_id: Annotated[str, Field(description="'vol_01J…'")]
) -> Done:
    """Delete a volume and all files on it; no sandbox may be using it."""
    await call_service(services.delete_volume, actor_of(ctx), volume_id)
    return Done(id=volume_id, done="Volume deleted, with all files on it.")


TOOLS = [read_tool(list_volumes), write_tool(delete_volume, destructive=True, idempotent=True)]
