"""The shapes of what REST answers about sandboxes; :mod:`sandboxes_app.presenters` makes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import Field

from orkestr_console.http.describing import one_of
from orkestr_console.http.json_api import Timestamp
from sandboxes_app.models import SandboxStatus, SnapshotStatus
from sandboxes_app.specs import SIZES

Status = Annotated[str, one_of(SandboxStatus.values)]
SizeName = Annotated[str, one_of(SIZES)]
NetworkName = Annotated[str, one_of(["off", "restricted", "open"])]


class SandboxDetail(TypedDict):
    """A sandbox. Its environment is never shown."""

    id: str
    status: Status
    template: Annotated[str, Field(description="As it was requested: an id, or a base's name.")]
    network: NetworkName
    size: SizeName
    cpu: float
    memory_mb: int
    region: str
    created_at: Timestamp
    expires_at: Timestamp
    ended_at: Timestamp | None
    on_timeout: Annotated[str, one_of(["kill", "pause"])]
    auto_resume: bool
    preview_auth: bool
    preview_auth_token: str | None
    paused_expires_at: Timestamp | None
    node_id: str
    metadata: dict[str, str]
    volume: str | None
    preview_host_base: str | None
    error_message: str | None
    boot_ms: float | None


class SandboxList(TypedDict):
    """A page of sandboxes, newest first."""

    sandboxes: list[SandboxDetail]
    next_cursor: str | None


class Expiry(TypedDict):
    """When a sandbox expires."""

    expires_at: Timestamp


class PausedSandbox(TypedDict):
    """The sandbox that is paused now."""

    sandbox_id: str


class SnapshotDetail(TypedDict):
    """A snapshot."""

    id: str
    status: Annotated[str, one_of(SnapshotStatus.values)]
    name: str | None
    template: str
    size: SizeName
    cpu: float
    memory_mb: int
    network: NetworkName
    source_sandbox_id: str
    size_mb: int | None
    node_id: str
    region: str
    error_message: str | None
    created_at: Timestamp
    ready_at: Timestamp | None


class SnapshotList(TypedDict):
    """A page of snapshots, newest first."""

    snapshots: list[SnapshotDetail]
    next_cursor: str | None


class VolumeDetail(TypedDict):
    """A volume."""

    id: str
    name: str
    size_mb: int
    used_mb: int
    status: Annotated[str, Field(description="What it is good for now.")]
    region: str
    node_id: str | None
    attached_sandbox_id: str | None
    max_lifetime_days: int | None
    max_lifetime_hours: int | None
    expires_at: Timestamp | None
    created_at: Timestamp


class VolumeList(TypedDict):
    """All volumes of the team."""

    volumes: list[VolumeDetail]


class RefusedRequests(TypedDict, total=False):
    """What the network policy refused while a command ran that failed."""

    error_code: Annotated[str, Field(description="`network_policy_blocked`.")]
    error_message: Annotated[str, Field(description="What was refused, and how to allow it.")]
    refused_hosts: Annotated[list[str], Field(description="Those that can be allowed by name.")]


class ExecResult(RefusedRequests):
    """A command that ended."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    truncated: Annotated[bool, Field(description="Whether there was more output than is kept.")]


class StreamEvent(RefusedRequests):
    """One event of a command's stream; what it has besides `kind` depends on that."""

    kind: Literal["exec_started", "exec_chunk", "exec_exited", "error"]
    pid: NotRequired[Annotated[int, Field(description="Of `exec_started`.")]]
    stream: NotRequired[Annotated[Literal["stdout", "stderr"], Field(description="`exec_chunk`'s")]]
    data: NotRequired[Annotated[str, Field(description="Output, in base64 (`exec_chunk`).")]]
    code: NotRequired[
        Annotated[int | str, Field(description="`exec_exited`: exit status; `error`: error code.")]
    ]
    duration_ms: NotRequired[Annotated[int, Field(description="Of `exec_exited`.")]]
    message: NotRequired[Annotated[str, Field(description="Why it ended, of `error`.")]]


class CommandDetail(RefusedRequests):
    """A background command."""

    id: str
    command: str
    pid: Annotated[int | None, Field(description="Inside the sandbox; null until it is known.")]
    status: Literal["running", "exited", "killed"]
    exit_code: int | None
    signal: int | None
    out_of_memory: bool
    duration_ms: int | None
    started_at: Timestamp


class CommandList(TypedDict):
    """All background commands that are known of, the newest first."""

    commands: list[CommandDetail]


class LogPart(RefusedRequests):
    """A part of what a background command has printed, and at its end what it was refused."""

    content: str
    size: Annotated[int, Field(description="Bytes printed so far.")]
    truncated: Annotated[bool, Field(description="Whether there is more after this.")]
    offset: int
    next_offset: Annotated[int, Field(description="Pass it as `offset` to go on.")]
    dropped: Annotated[int, Field(description="Bytes before `offset` that are not kept any more.")]


class DirectoryEntry(TypedDict):
    """What is in a directory."""

    name: str
    is_dir: bool
    size: int
    mode: int
    modified_at: Timestamp


class PathContent(TypedDict):
    """A file with its `content`, or a directory with its `entries`."""

    path: str
    is_dir: bool
    content: NotRequired[Annotated[str, Field(description="The file's bytes, in base64.")]]
    entries: NotRequired[list[DirectoryEntry]]


class PathStat(TypedDict):
    """What is at a path; `mode` and `modified_at` only if something is."""

    path: str
    exists: bool
    is_dir: bool
    size: int
    mode: NotRequired[int]
    modified_at: NotRequired[Timestamp]


class WrittenFile(TypedDict):
    """A file that was written."""

    path: str
    bytes_written: int


class BatchError(TypedDict):
    """Why a file of a batch was not written."""

    code: str


class BatchResult(TypedDict):
    """What became of one file of a batch."""

    path: str
    bytes_written: int | None
    error: BatchError | None


class BatchResults(TypedDict):
    """What became of each file, in the order of the request."""

    results: list[BatchResult]


class PresignedAddress(TypedDict):
    """An address that needs no token, until it expires. To send a file, it can be used once."""

    url: str
    method: Annotated[str, one_of(["GET", "PUT"])]
    path: str
    expires_at: Timestamp


class CpuUse(TypedDict):
    """A sandbox's CPU; null figures unless it is running."""

    cores: float
    usage_cores: float | None
    usage_percent: float | None


class MemoryUse(TypedDict):
    """A sandbox's memory; null figures unless it is running."""

    limit_bytes: int
    usage_bytes: int | None
    usage_percent: float | None


class LifetimeUse(TypedDict):
    """What a sandbox has used in all."""

    cpu_seconds: float
    gb_seconds: float


class DiskUse(TypedDict):
    """The space that it takes; nobody knows while it is paused."""

    usage_bytes: int | None


class NetworkUse(TypedDict):
    """What it has sent and received."""

    sent_bytes: int | None
    received_bytes: int | None


class MetricsSample(TypedDict):
    """What a sandbox used at one moment, or, further back, in the `seconds` before it."""

    t: Timestamp
    cpu_percent: float
    mem_bytes: int
    seconds: NotRequired[float]
    disk_bytes: NotRequired[int | None]
    sent_bytes: NotRequired[int | None]
    received_bytes: NotRequired[int | None]


class MetricsDetail(TypedDict):
    """What a sandbox uses."""

    sandbox_id: str
    sandbox_status: Status
    as_of: Timestamp
    sample_interval_seconds: int
    window_seconds: int
    cpu: CpuUse
    memory: MemoryUse
    lifetime: LifetimeUse
    disk: DiskUse
    network: NetworkUse
    samples: list[MetricsSample]


class SizeDetail(TypedDict):
    """A size, and whether the plan allows it."""

    size: SizeName
    cpu: float
    memory_mb: int
    allowed: bool


class Region(TypedDict):
    """Where sandboxes run."""

    id: str
    label: str


class LimitsDetail(TypedDict):
    """What the team's plan allows."""

    plan: str
    allowed_sizes: list[SizeName]
    sizes: list[SizeDetail]
    regions: list[Region]
    networks: list[NetworkName]
    max_concurrent: int
    max_concurrent_commands: int
    max_templates: int
    max_concurrent_builds: int
    max_snapshots: int
    max_named_snapshots: int
    max_volumes: int
    volume_disk_mb: int
    max_timeout_seconds: int
    max_running_lifetime_seconds: int | None
    custom_egress_allowlist: bool
    default_egress_domains: list[str]
    trial_credit_eur: float
    trial_credit_used_eur: float


class ContextDetail(TypedDict):
    """A context of the code interpreter: one kernel."""

    context_id: str
    language: str
    cwd: str
    created_at: Timestamp
    last_used_at: Timestamp | None
    executions: Annotated[int, Field(description="Since its kernel was started.")]
    alive: Annotated[bool, Field(description="Whether its kernel runs; the next run starts one.")]


class ContextList(TypedDict):
    """All contexts, the newest first."""

    contexts: list[ContextDetail]


class CodeException(TypedDict):
    """An exception that the code raised."""

    name: str
    value: str
    traceback: list[str]


class CodeOutput(TypedDict):
    """A value or figure; `type` is its richest representation."""

    type: Literal["text", "html", "image_png", "json", "chart"]
    text: str | None
    html: str | None
    svg: str | None
    png: Annotated[str | None, Field(description="Base64.")]
    json: Annotated[dict[str, Any] | list[Any] | None, Field(description="As the kernel gave it.")]
    chart: Annotated[
        dict[str, Any] | None, Field(description="What a figure of matplotlib shows, as data.")
    ]


class CodeEnd(TypedDict):
    """How a run ended."""

    error: CodeException | None
    execution_count: int | None
    context_id: str
    duration_ms: int
    interrupted: Annotated[bool, Field(description="At its timeout; variables are kept.")]
    restarted: Annotated[bool, Field(description="Its kernel had ended; variables are gone.")]
    truncated: Annotated[list[str], Field(description="What was cut, as it was too long.")]


class CodeResult(CodeEnd):
    """What came of a run."""

    results: list[CodeOutput]
    stdout: str
    stderr: str


class CodeEvent(TypedDict):
    """One event of a run's stream; what it has besides `kind` depends on that."""

    kind: Literal["started", "stream", "result", "error", "done"]
    stream: NotRequired[Annotated[Literal["stdout", "stderr"], Field(description="`stream`'s.")]]
    text: NotRequired[Annotated[str, Field(description="Of `stream`.")]]
    result: NotRequired[Annotated[CodeOutput, Field(description="Of `result`.")]]
    error: NotRequired[
        Annotated[CodeException | None, Field(description="Of `error`, and again of `done`.")]
    ]
    error_code: NotRequired[
        Annotated[str, Field(description="Of an `error` that ends the stream: not the code's own.")]
    ]
    context_id: NotRequired[Annotated[str, Field(description="Of `started` and `done`.")]]
    restarted: NotRequired[Annotated[bool, Field(description="Of `started` and `done`.")]]
    execution_count: NotRequired[Annotated[int | None, Field(description="Of `done`.")]]
    duration_ms: NotRequired[Annotated[int, Field(description="Of `done`.")]]
    interrupted: NotRequired[Annotated[bool, Field(description="Of `done`.")]]
    truncated: NotRequired[Annotated[list[str], Field(description="Of `done`.")]]


class PreviewHost(TypedDict):
    """Where a port of a sandbox is seen."""

    host: str


class EgressHostDetail(TypedDict):
    """A sandbox's requests to one host and port; port 0 stands for DNS."""

    host: str
    port: int
    allowed: int
    refused: int
    unreached: Annotated[int, Field(description="Allowed ones that failed on their way.")]
    direct: Annotated[bool, Field(description="Whether they bypassed the proxy.")]
    reason: str
    message: str
    sent_bytes: int
    received_bytes: int
    last_at: Timestamp


class EgressHostList(TypedDict):
    """The hosts that a sandbox made requests to, refused ones first."""

    hosts: list[EgressHostDetail]


class SandboxOfTemplate(TypedDict):
    """A live sandbox that was started from a template."""

    id: str
    status: Status
    created_at: Timestamp
    expires_at: Timestamp


class TemplateUseDetail(TypedDict):
    """What uses a template, and what deleting it frees."""

    template_id: str
    running_sandboxes: int
    sandboxes: list[SandboxOfTemplate]
    derived_templates: int
    last_used_at: Timestamp | None
    size_bytes: int | None
    reclaimable_bytes: int | None
