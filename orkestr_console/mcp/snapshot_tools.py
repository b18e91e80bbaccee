"""The tools for snapshots."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orkestr_console.mcp.lists import Row, live_first
from orkestr_console.mcp.results import (
    Done,
    Rows,
    SnapshotDetail,
    snapshot_detail,
    snapshot_row,
)
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import Ctx, actor_of, call_service, read_tool, write_tool
from orkestr_console.mcp.using import SandboxId, using
from sandboxes_app import services
from sandboxes_app.models import Snapshot
from sandboxes_app.specs import SnapshotSpec


async def snapshot_sandbox(ctx: Ctx, sandbox_id: SandboxId, spec: SnapshotSpec) -> SnapshotDetail:
    """Save all files of a running sandbox, but not its memory, to start others from
    (create_sandbox with snapshot). It keeps running."""
    async with using(ctx, sandbox_id) as use:
        return snapshot_detail(
            await call_service(services.create_snapshot, use.actor, use.id, spec)
        )


async def list_snapshots(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> Rows:
    """List snapshots: usable ones first, then failed ones."""
    actor = actor_of(ctx)

    async def read_page(
        live: bool,
        count: int,
        after: str | None,
    ) -> tuple[list[Snapshot], str | None]:
        return await call_service(
            services.list_snapshots, actor, failed=not live, limit=count, cursor=after
        )

    async def describe(snapshots: list[Snapshot]) -> list[Row]:
        return [snapshot_row(snapshot) for snapshot in snapshots]

    rows, next_cursor = await live_first(read_page, describe, limit, cursor)
    return Rows.model_validate({"snapshots": rows, "next_cursor": next_cursor})


async def delete_snapshot(
    ctx: Ctx, snapshot_id: Annotated[str, Field(description="'snap_01J…'")]
) -> Done:
    """Delete a snapshot; sandboxes started from it keep running."""
    await call_service(services.delete_snapshot, actor_of(ctx), snapshot_id)
    return Done(id=snapshot_id, done="Snapshot deleted.")


TOOLS = [
    write_tool(snapshot_sandbox),
    read_tool(list_snapshots),
    write_tool(delete_snapshot, destructive=True, idempotent=True),
]
