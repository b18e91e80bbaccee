"""The tools for snapshots of sandboxes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orkestr_console.mcp.answers import Done, SnapshotAnswer, Snapshots, snapshot_answer
from orkestr_console.mcp.sandbox_tools import SandboxId
from orkestr_console.mcp.template_tools import Cursor, Limit
from orkestr_console.mcp.tool import Ctx, actor_of, ask, reading, writing
from sandboxes_app import services
from sandboxes_app.specs import SnapshotSpec


async def snapshot_sandbox(ctx: Ctx, sandbox_id: SandboxId, spec: SnapshotSpec) -> SnapshotAnswer:
    """Keep the files of a running sandbox as they are now, to start any number of others from.

    The sandbox runs on; it stands still only while its disk is copied. All files are captured,
    /workspace and /tmp included, but no memory: programs have to be started again in a sandbox
    made from it. Call create_sandbox with snapshot set to the id.
    """
    return snapshot_answer(await ask(services.create_snapshot, actor_of(ctx), sandbox_id, spec))


async def list_snapshots(ctx: Ctx, limit: Limit = None, cursor: Cursor = None) -> Snapshots:
    """List the team's snapshots, newest first; those with status 'ready' can be started from."""
    rows, following = await ask(services.list_snapshots, actor_of(ctx), limit=limit, cursor=cursor)
    return Snapshots(snapshots=[snapshot_answer(row) for row in rows], next_cursor=following)


async def delete_snapshot(
    ctx: Ctx,
    snapshot_id: Annotated[str, Field(description="A snapshot's id, such as 'snap_01J…'.")],
) -> Done:
    """Delete a snapshot for good; sandboxes that were started from it run on."""
    await ask(services.delete_snapshot, actor_of(ctx), snapshot_id)
    return Done(id=snapshot_id, done="Snapshot deleted.")


TOOLS = [
    writing(snapshot_sandbox),
    reading(list_snapshots),
    writing(delete_snapshot, destructive=True, idempotent=True),
]
