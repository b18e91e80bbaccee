"""The tools for volumes, which create_sandbox creates."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orkestr_console.mcp.results import Done, VolumeList, volume_detail
from orkestr_console.mcp.tool import Ctx, actor_of, call_service, read_tool, write_tool
from sandboxes_app import services


async def list_volumes(ctx: Ctx) -> VolumeList:
    """List the team's volumes: storage that create_sandbox mounts at /persist, one at a time."""
    rows = await call_service(services.list_volumes, actor_of(ctx))
    return VolumeList(volumes=[volume_detail(row) for row in rows])


async def delete_volume(
    ctx: Ctx,
    volume_id: Annotated[str, Field(description="A volume's id, such as 'vol_01J…'.")],
) -> Done:
    """Delete a volume and all files on it permanently. No sandbox may be using it."""
    await call_service(services.delete_volume, actor_of(ctx), volume_id)
    return Done(id=volume_id, done="Volume deleted, with all files on it.")


TOOLS = [read_tool(list_volumes), write_tool(delete_volume, destructive=True, idempotent=True)]
