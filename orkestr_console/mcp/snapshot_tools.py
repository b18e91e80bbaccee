"""The tools for snapshots."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orkestr_console.mcp.results import Done, SnapshotDetail, SnapshotPage, snapshot_detail
from orkestr_console.mcp.sandbox_tools import SandboxId
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import Ctx, actor_of, call_service, read_tool, write_tool
from sandboxes_app import services
from sandboxes_app.specs import SnapshotSpec


async def snapshot_sandbox(ctx: Ctx, sandbox_id: SandboxId, spec: SnapshotSpec) -> SnapshotDetail:
    """Save the files of a running sandbox as they are now, to start any number of others from.

    The sandbox keeps running; it is paused only while its disk is copied. All files are captured,
    including /workspace and /tmp, but not memory: start your programs again in the new sandbox.
    Call create_sandbox with snapshot set to the id.
    """
    return snapshot_detail(
        await call_service(services.create_snapshot, actor_of(ctx), sandbox_id, spec)
    )


async def list_snapshots(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> SnapshotPage:
    """List the team's snapshots, newest first; start sandboxes from those with status 'ready'."""
    rows, next_cursor = await call_service(
        services.list_snapshots, actor_of(ctx), limit=limit, cursor=cursor
    )
    return SnapshotPage(snapshots=[snapshot_detail(row) for row in rows], next_cursor=next_cursor)


async def delete_snapshot(
    ctx: Ctx,
    snapshot_id: Annotated[str, Field(description="A snapshot's id, such as 'snap_01J…'.")],
) -> Done:
    """Delete a snapshot permanently; sandboxes that were started from it keep running."""
    await call_service(services.delete_snapshot, actor_of(ctx), snapshot_id)
    return Done(id=snapshot_id, done="Snapshot deleted.")


TOOLS = [
    write_tool(snapshot_sandbox),
    read_tool(list_snapshots),
    write_tool(delete_snapshot, destructive=True, idempotent=True),
]
