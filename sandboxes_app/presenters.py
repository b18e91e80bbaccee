"""Sandboxes as the API presents them."""

from __future__ import annotations

import base64
import posixpath
from datetime import UTC, datetime
from typing import Literal
from urllib.parse import quote

from django.utils.http import content_disposition_header

from hostruntime.wire.background import CommandInfo
from hostruntime.wire.files import DirectoryListing, FileContent, FilePart, FileStat
from hostruntime.wire.health import EgressHost
from hostruntime.wire.interpreter import ContextInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.http.json_api import timestamp
from orkestr_console.http.ranges import content_range
from orkestr_console.http.uploads import PREFIX
from sandboxes_app.answers import (
    BatchResults,
    CodeResult,
    CommandDetail,
    ContextDetail,
    DirectoryEntry,
    EgressHostList,
    ExecResult,
    LimitsDetail,
    LogPart,
    MetricsDetail,
    MetricsSample,
    PathContent,
    PathStat,
    PresignedAddress,
    RefusedRequests,
    SandboxDetail,
    SnapshotDetail,
    TemplateUseDetail,
    VolumeDetail,
)
from sandboxes_app.models import Sandbox, Snapshot, Volume
from sandboxes_app.services import (
    Address,
    BatchRow,
    CodeAnswer,
    CommandLogs,
    ExecAnswer,
    Limits,
    Metrics,
    Refusal,
    TemplateUse,
    code_end,
    code_result,
    preview_host_base,
    shown_token,
)
from sandboxes_app.specs import SIZES


def sandbox_detail(sandbox: Sandbox, actor: Actor | None = None) -> SandboxDetail:
    """A sandbox, on its own or in a list, with its previews' token if the caller may use it.

    Its environment is never shown.
    """
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
        "preview_auth_token": shown_token(actor, sandbox) if actor else None,
        "paused_expires_at": timestamp(sandbox.expires_at) if sandbox.is_paused else None,
        "node_id": sandbox.node_id,
        "metadata": sandbox.metadata,
        "volume": sandbox.volume_name or None,
        "preview_host_base": preview_host_base(sandbox),
        "error_message": sandbox.error_message or None,
        "boot_ms": sandbox.boot_ms,
    }


def snapshot_detail(snapshot: Snapshot) -> SnapshotDetail:
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


def volume_detail(volume: Volume) -> VolumeDetail:
    """A volume, on its own or in a list."""
    return {
        "id": volume.pk,
        "name": volume.name,
        "size_mb": volume.size_mb,
        "used_mb": volume.used_mb,
        "status": volume.status,
        "region": volume.region,
        "node_id": volume.node_id or None,
        "attached_sandbox_id": volume.holder,
        "max_lifetime_days": volume.max_lifetime_days,
        "max_lifetime_hours": volume.max_lifetime_hours,
        "expires_at": timestamp(volume.expires_at),
        "created_at": timestamp(volume.created_at),
    }


def exec_answer(answer: ExecAnswer) -> ExecResult:
    """A command that ended; only if something was refused while it ran, that is told as well."""
    refused: RefusedRequests = answer.refusal.members if answer.refusal else {}
    return {
        "stdout": answer.stdout,
        "stderr": answer.stderr,
        "exit_code": answer.exit_code,
        "duration_ms": answer.duration_ms,
        "truncated": answer.truncated,
        **refused,
    }


def path_content(found: FileContent | DirectoryListing) -> PathContent:
    """A file's bytes in base64, or a directory's entries."""
    if isinstance(found, FileContent):
        return {
            "path": found.stat.path,
            "is_dir": False,
            "content": base64.b64encode(found.content).decode("ascii"),
        }
    entries: list[DirectoryEntry] = [
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


def path_stat(stat: FileStat) -> PathStat:
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


def presigned(address: Address, origin: str) -> PresignedAddress:
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


def batch_rows(rows: list[BatchRow]) -> BatchResults:
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


def command_detail(command: CommandInfo, refusal: Refusal | None = None) -> CommandDetail:
    """A background command."""
    refused: RefusedRequests = refusal.members if refusal else {}
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
        **refused,
    }


def context_detail(context: ContextInfo) -> ContextDetail:
    """A context of the code interpreter."""
    used_at = context.last_used_at
    return {
        "context_id": context.id,
        "language": context.language,
        "cwd": context.cwd,
        "created_at": unix_timestamp(context.created_at),
        "last_used_at": None if used_at is None else unix_timestamp(used_at),
        "executions": context.executions,
        "alive": context.alive,
    }


def code_answer(answer: CodeAnswer) -> CodeResult:
    """What came of a run."""
    results = [each.result for each in answer.frames if each.result is not None]
    return {
        "results": [code_result(each) for each in results],
        "stdout": answer.printed("stdout"),
        "stderr": answer.printed("stderr"),
        **code_end(answer.last, answer.error),
    }


def command_logs(logs: CommandLogs, asked: int, refusal: Refusal | None) -> LogPart:
    """A part of what a background command has printed, from ``asked`` on.

    A line after the last part says what it was refused, as official clients show nothing else. It
    is past the end of the output, so whoever goes on from there doesn't get it again. Where
    more may be printed, by what the command has left behind, there is no such line, as whoever goes
    on after it would miss as much of that.
    """
    refused: RefusedRequests = refusal.members if refusal else {}
    is_end = not logs.truncated and not logs.command.active
    notice = refusal.notice if refusal and is_end and asked <= logs.size else ""
    next_offset = logs.next_offset + len(notice.encode())
    return {
        "content": logs.content + notice,
        "size": logs.size,
        "truncated": logs.truncated,
        "offset": logs.offset,
        "next_offset": max(next_offset, asked) if is_end and refusal else next_offset,
        "dropped": logs.dropped,
        **refused,
    }


def metrics_detail(metrics: Metrics) -> MetricsDetail:
    """What a sandbox uses: shares of its own CPUs and memory, its disk and network, its totals."""
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
        "disk": {"usage_bytes": live.disk_bytes if live else None},
        "network": {
            "sent_bytes": live.sent_bytes if live else None,
            "received_bytes": live.received_bytes if live else None,
        },
        "samples": [*metrics_points(metrics), *metrics_samples(metrics)],
    }


def metrics_samples(metrics: Metrics) -> list[MetricsSample]:
    """Those of the last minute that the caller doesn't know."""
    return [
        {
            "t": unix_timestamp(sample.at),
            "cpu_percent": percent(sample.cpu_cores, metrics.sandbox.cpu),
            "mem_bytes": sample.memory_bytes,
        }
        for sample in (metrics.measured.samples if metrics.measured else ())
        if sample.at > metrics.since
    ]


def metrics_points(metrics: Metrics) -> list[MetricsSample]:
    """What was before the samples of the last minute; ``seconds`` is the time each is about."""
    samples = metrics.measured.samples if metrics.measured else ()
    until = samples[0].at if samples else float("inf")
    cpus = metrics.sandbox.cpu
    return [
        {
            "t": unix_timestamp(point.at),
            "cpu_percent": percent(point.cpu_seconds / point.seconds, cpus),
            "mem_bytes": point.memory_bytes,
            "seconds": round(point.seconds, 1),
            "disk_bytes": point.disk_bytes,
            "sent_bytes": point.sent_bytes,
            "received_bytes": point.received_bytes,
        }
        for point in metrics.points
        if point.at < until
    ]


def percent(part: float, whole: float) -> float:
    """A share in percent."""
    return round(100 * part / whole, 2)


def limits_detail(limits: Limits) -> LimitsDetail:
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
        "max_volumes": allowed.value("max_volumes"),
        "volume_disk_mb": allowed.value("volume_disk_mb"),
        "max_timeout_seconds": allowed.value("max_timeout_seconds"),
        "max_running_lifetime_seconds": plan.max_running_lifetime_seconds,
        "custom_egress_allowlist": plan.custom_egress_allowlist,
        "default_egress_domains": limits.default_domains,
        "trial_credit_eur": 0.0,
        "trial_credit_used_eur": 0.0,
    }


def egress_hosts(hosts: list[EgressHost]) -> EgressHostList:
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


def unix_timestamp(seconds: float) -> str:
    """A Unix time in the API's format."""
    return timestamp(datetime.fromtimestamp(seconds, UTC))


def template_use_detail(use: TemplateUse) -> TemplateUseDetail:
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
