"""Sandboxes as the API presents them."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

from hostruntime.wire.files import DirectoryListing, FileContent, FileStat
from hostruntime.wire.health import EgressHost
from orkestr_console.http.json_api import timestamp
from sandboxes_app.models import Sandbox, Snapshot
from sandboxes_app.services import BatchRow, ExecAnswer, Limits, TemplateUse
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
        "preview_auth_token": None,
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
