"""Operations on sandboxes, shared by console, REST and MCP."""

from __future__ import annotations

from sandboxes_app.services.commands import (
    CommandStream,
    ExecAnswer,
    exec_command,
    exec_stream,
)
from sandboxes_app.services.create import create_sandbox, usage_counts
from sandboxes_app.services.egress import list_egress
from sandboxes_app.services.files import (
    BatchRow,
    delete_path,
    mkdir,
    move,
    read_path,
    stat,
    write_batch,
    write_file,
)
from sandboxes_app.services.lifecycle import (
    get_sandbox,
    list_sandboxes,
    set_timeout,
    terminate_sandbox,
)
from sandboxes_app.services.limits import Limits, limits
from sandboxes_app.services.pausing import pause_sandbox, resume_sandbox
from sandboxes_app.services.snapshots import (
    create_snapshot,
    delete_snapshot,
    get_snapshot,
    list_snapshots,
)
from sandboxes_app.services.template_use import TemplateUse, template_use

__all__ = [
    "BatchRow",
    "CommandStream",
    "ExecAnswer",
    "Limits",
    "TemplateUse",
    "create_sandbox",
    "create_snapshot",
    "delete_path",
    "delete_snapshot",
    "exec_command",
    "exec_stream",
    "get_sandbox",
    "get_snapshot",
    "limits",
    "list_egress",
    "list_sandboxes",
    "list_snapshots",
    "mkdir",
    "move",
    "pause_sandbox",
    "read_path",
    "resume_sandbox",
    "set_timeout",
    "stat",
    "template_use",
    "terminate_sandbox",
    "usage_counts",
    "write_batch",
    "write_file",
]
