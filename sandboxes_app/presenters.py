"""Sandboxes as the API presents them."""

from __future__ import annotations

import base64
import posixpath
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote

from django.utils.http import content_disposition_header

from hostruntime.wire.background import CommandInfo
from hostruntime.wire.files import DirectoryListing, FileContent, FilePart, FileStat
from hostruntime.wire.health import EgressHost
from orkestr_console.http.json_api import timestamp
from orkestr_console.http.ranges import content_range
from orkestr_console.http.uploads import PREFIX
from sandboxes_app.models import Sandbox, Snapshot
from sandboxes_app.services import (
    Address,
    BatchRow,
    CommandLogs,
    ExecAnswer,
    Limits,
    Metrics,
    TemplateUse,
    preview_token,
)
from sandboxes_app.specs import SIZES


def sandbox_detail(sandbox: Sandbox) -> dict[str, Any]:
    """A sandbox, on its own or in a list. Its environment is never shown."""
    return {
        "id": sandbox.pk,
        "status": sandbox.status,
        "template": sandbox.template,
        "network": sandbox.network,
        "size": sandbox.size,
        "cpu": sandbox.cpu,
        "memory_mb": sandbox.memory_mb,
        "region": sandbox.region,
        "created_at": timestamp(sandbox.created_at),
        "expires_at": timestamp(sandbox.expires_at),
        "ended_at": timestamp(sandbox.ended_at),
        "on_timeout": sandbox.on_timeout,
        "auto_resume": sandbox.auto_resume,
        "preview_auth": sandbox.preview_auth,
        "preview_auth_token": preview_token(sandbox) if sandbox.preview_auth else None,
        "paused_expires_at": timestamp(sandbox.expires_at) if sandbox.is_paused else None,
        "node_id": sandbox.node_id,
        "metadata": sandbox.metadata,
        "volume": None,
        "preview_host_base": None,
        "error_message": sandbox.error_message or None,
        "boot_ms": sandbox.boot_ms,
    }


def snapshot_detail(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot, on its own or in a list."""
    return {
        "id": snapshot.pk,
        "status": snapshot.status,
        "name": snapshot.name or None,
        "template": snapshot.template,
        "size": snapshot.size,
        "cpu": snapshot.cpu,
        "memory_mb": snapshot.memory_mb,
        "network": snapshot.network,
        "source_sandbox_id": snapshot.source_sandbox_id,
        "size_mb": snapshot.size_mb,
        "node_id": snapshot.node_id,
        "region": snapshot.region,
        "error_message": snapshot.error_message or None,
        "created_at": timestamp(snapshot.created_at),
        "ready_at": timestamp(snapshot.ready_at),
    }


def exec_answer(answer: ExecAnswer) -> dict[str, Any]:
    """A command that ended."""
    return {
        "stdout": answer.stdout,
        "stderr": answer.stderr,
        "exit_code": answer.exit_code,
        "duration_ms": answer.duration_ms,
        "truncated": answer.truncated,
    }


def path_content(found: FileContent | DirectoryListing) -> dict[str, Any]:
    """A file's bytes in base64, or a directory's entries."""
    if isinstance(found, FileContent):
        return {
            "path": found.stat.path,
            "is_dir": False,
            "content": base64.b64encode(found.content).decode("ascii"),
        }
    entries = [
        {
            "name": entry.name,
            "is_dir": entry.is_dir,
            "size": entry.size,
            "mode": entry.mode,
            "modified_at": unix_timestamp(entry.modified_at),
        }
        for entry in found.entries
    ]
    return {"path": found.stat.path, "is_dir": True, "entries": entries}


def path_stat(stat: FileStat) -> dict[str, Any]:
    """What is at a path."""
    if not stat.exists:
        return {"path": stat.path, "exists": False, "is_dir": False, "size": 0}
    return {
        "path": stat.path,
        "exists": True,
        "is_dir": stat.is_dir,
        "size": stat.size,
        "mode": stat.mode,
        "modified_at": unix_timestamp(stat.modified_at),
    }


def presigned(address: Address, origin: str) -> dict[str, Any]:
    """An address that a file is sent to or fetched from, at this origin."""
    return {
        "url": f"{origin}{PREFIX}{address.signed()}",
        "method": address.method,
        "path": address.path,
        "expires_at": timestamp(address.expires_at),
    }


def file_headers(path: str, part: FilePart, *, partial: bool) -> dict[str, str]:
    """The headers of a file's bytes: to save, as a browser must show nobody's file as our page."""
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(part.length),
        "Accept-Ranges": "bytes",
    }
    name = posixpath.basename(path)
    if name.endswith("\n"):
        # Django quotes every other one (RFC 8187).
        headers["Content-Disposition"] = f"attachment; filename*=utf-8''{quote(name)}"
    elif named := content_disposition_header(True, name):  # noqa: FBT003
        headers["Content-Disposition"] = named
    return {**headers, "Content-Range": content_range(part)} if partial else headers


def batch_rows(rows: list[BatchRow]) -> dict[str, Any]:
    """The result of each file of a batch."""
    return {
        "results": [
            {
                "path": row.path,
                "bytes_written": row.bytes_written,
                "error": {"code": row.error} if row.error else None,
            }
            for row in rows
        ]
    }


def command_status(command: CommandInfo) -> Literal["running", "killed", "exited"]:
    """A background command's status. That it was killed decides, not how it took it."""
    if command.running:
        return "running"
    killed = command.killed or command.signal is not None or command.code is None
    return "killed" if killed else "exited"


def command_detail(command: CommandInfo) -> dict[str, Any]:
    """A background command."""
    status = command_status(command)
    return {
        "id": command.id,
        "command": command.command,
        "pid": command.pid,
        "status": status,
        "exit_code": command.code if status == "exited" else None,
        "signal": command.signal,
        "out_of_memory": command.out_of_memory,
        "duration_ms": command.duration_ms,
        "started_at": unix_timestamp(command.started_at),
    }


def command_logs(logs: CommandLogs) -> dict[str, Any]:
    """A part of what a background command has printed."""
    return {
        "content": logs.content,
        "size": logs.size,
        "truncated": logs.truncated,
        "offset": logs.offset,
        "next_offset": logs.next_offset,
        "dropped": logs.dropped,
    }


def metrics_detail(metrics: Metrics) -> dict[str, Any]:
    """What a sandbox uses: shares of its own CPUs and memory, and its totals."""
    sandbox, measured = metrics.sandbox, metrics.measured
    samples = measured.samples if measured else ()
    live = measured if sandbox.is_running else None
    cores = samples[-1].cpu_cores if live and samples else None
    memory = live.memory_bytes if live else None
    limit = sandbox.memory_mb * 1024 * 1024
    return {
        "sandbox_id": sandbox.pk,
        "sandbox_status": sandbox.status,
        "as_of": timestamp(metrics.at),
        "sample_interval_seconds": 2,
        "window_seconds": 60,
        "cpu": {
            "cores": sandbox.cpu,
            "usage_cores": None if cores is None else round(cores, 3),
            "usage_percent": None if cores is None else percent(cores, sandbox.cpu),
        },
        "memory": {
            "limit_bytes": limit,
            "usage_bytes": memory,
            "usage_percent": None if memory is None else percent(memory, limit),
        },
        "lifetime": {
            "cpu_seconds": measured.total.cpu_seconds if measured else sandbox.cpu_seconds,
            "gb_seconds": measured.total.gb_seconds if measured else sandbox.gb_seconds,
        },
        "samples": [
            {
                "t": unix_timestamp(sample.at),
                "cpu_percent": percent(sample.cpu_cores, sandbox.cpu),
                "mem_bytes": sample.memory_bytes,
            }
            for sample in samples
            if sample.at > metrics.since
        ],
    }


def percent(part: float, whole: float) -> float:
    """A share in percent."""
    return round(100 * part / whole, 2)


def limits_detail(limits: Limits) -> dict[str, Any]:
    """The plan's envelope, as in the wire contract. There is no trial credit here."""
    allowed, plan = limits.envelope, limits.envelope.plan
    return {
        "plan": plan.code,
        "allowed_sizes": list(allowed.sizes),
        "sizes": [
            {"size": size, "cpu": cpu, "memory_mb": mb, "allowed": size in allowed.sizes}
            for size, (cpu, mb) in SIZES.items()
        ],
        "regions": [{"id": limits.region, "label": limits.region}],
        "networks": list(allowed.networks),
        "max_concurrent": allowed.value("max_concurrent_sandboxes"),
        "max_concurrent_commands": allowed.value("max_concurrent_commands"),
        "max_templates": allowed.value("max_templates"),
        "max_concurrent_builds": allowed.value("max_concurrent_builds"),
        "max_snapshots": allowed.value("max_snapshots"),
        "max_named_snapshots": allowed.value("max_named_snapshots"),
        "max_timeout_seconds": allowed.value("max_timeout_seconds"),
        "max_running_lifetime_seconds": plan.max_running_lifetime_seconds,
        "custom_egress_allowlist": plan.custom_egress_allowlist,
        "default_egress_domains": limits.default_domains,
        "trial_credit_eur": 0.0,
        "trial_credit_used_eur": 0.0,
    }


def egress_hosts(hosts: list[EgressHost]) -> dict[str, Any]:
    """A sandbox's requests to each host; ``reason`` and ``message`` are of the latest result.

    ``direct`` ones bypassed the proxy: by DNS, which has no port (0), or by address.
    """
    return {
        "hosts": [
            {
                "host": use.host,
                "port": use.port,
                "allowed": use.allowed,
                "refused": use.refused,
                "unreached": use.unreached,
                "direct": use.direct,
                "reason": use.reason,
                "message": use.message,
                "sent_bytes": use.sent_bytes,
                "received_bytes": use.received_bytes,
                "last_at": unix_timestamp(use.last_at),
            }
            for use in hosts
        ]
    }


def unix_timestamp(seconds: float) -> str | None:
    """A Unix time in the API's format."""
    return timestamp(datetime.fromtimestamp(seconds, UTC))


def template_use_detail(use: TemplateUse) -> dict[str, Any]:
    """What uses a template."""
    return {
        "template_id": use.template.pk,
        "running_sandboxes": use.count,
        "sandboxes": [
            {
                "id": sandbox.pk,
                "status": sandbox.status,
                "created_at": timestamp(sandbox.created_at),
                "expires_at": timestamp(sandbox.expires_at),
            }
            for sandbox in use.sandboxes
        ],
        "derived_templates": use.derived,
        "last_used_at": timestamp(use.last_used_at),
        "size_bytes": use.template.size_bytes,
        "reclaimable_bytes": use.reclaimable_bytes,
    }
