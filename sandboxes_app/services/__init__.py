"""Operations on sandboxes, shared by console, REST and MCP."""

from __future__ import annotations

from sandboxes_app.services.background import (
    LARGEST_OFFSET,
    CommandLogs,
    Following,
    begin_following,
    follow,
    get_command,
    kill_command,
    list_commands,
    read_last_logs,
    read_logs,
    start_command,
    started_frame,
)
from sandboxes_app.services.commands import (
    Command,
    CommandStream,
    ExecAnswer,
    Outcome,
    conclude_command,
    exec_command,
    exec_stream,
    prepare_command,
    run_command,
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
from sandboxes_app.services.metrics import Metrics, get_metrics
from sandboxes_app.services.naming import end_reasons, find_named
from sandboxes_app.services.pausing import pause_sandbox, resume_sandbox
from sandboxes_app.services.previews import preview_token
from sandboxes_app.services.ranges import FileRange, edit_file, read_range
from sandboxes_app.services.snapshots import (
    create_snapshot,
    delete_snapshot,
    get_snapshot,
    list_snapshots,
)
from sandboxes_app.services.template_use import TemplateUse, template_use
from sandboxes_app.services.transfers import (
    Address,
    Download,
    Transfer,
    UploadOutcome,
    begin_download,
    begin_upload,
    conclude_upload,
    presign_download,
    presign_upload,
    run_upload,
)

__all__ = [
    "LARGEST_OFFSET",
    "Address",
    "BatchRow",
    "Command",
    "CommandLogs",
    "CommandStream",
    "Download",
    "ExecAnswer",
    "FileRange",
    "Following",
    "Limits",
    "Metrics",
    "Outcome",
    "TemplateUse",
    "Transfer",
    "UploadOutcome",
    "begin_download",
    "begin_following",
    "begin_upload",
    "conclude_command",
    "conclude_upload",
    "create_sandbox",
    "create_snapshot",
    "delete_path",
    "delete_snapshot",
    "edit_file",
    "end_reasons",
    "exec_command",
    "exec_stream",
    "find_named",
    "follow",
    "get_command",
    "get_metrics",
    "get_sandbox",
    "get_snapshot",
    "kill_command",
    "limits",
    "list_commands",
    "list_egress",
    "list_sandboxes",
    "list_snapshots",
    "mkdir",
    "move",
    "pause_sandbox",
    "prepare_command",
    "presign_download",
    "presign_upload",
    "preview_token",
    "read_last_logs",
    "read_logs",
    "read_path",
    "read_range",
    "resume_sandbox",
    "run_command",
    "run_upload",
    "set_timeout",
    "start_command",
    "started_frame",
    "stat",
    "template_use",
    "terminate_sandbox",
    "usage_counts",
    "write_batch",
    "write_file",
]
