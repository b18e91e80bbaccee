"""What the tools return: the schemas that agents see, filled from REST's presenters."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from orkestr_console.accounts.limits import envelope
from orkestr_console.core.text import plain, shorten_list
from sandboxes_app import presenters as sandbox_presenters
from sandboxes_app.models import Sandbox, Snapshot, Volume
from templates_app import presenters as template_presenters
from templates_app import services as templates
from templates_app.models import StepStatus, Template
from templates_app.services import StepOutput

# All in characters.
LOG_TAIL = 4_000
MAX_RECIPE = 16_000
MAX_COMMAND = 200


class Result(BaseModel):
    """The base class: built from a presenter's dictionary, ignoring keys it has no field for."""

    model_config = ConfigDict(extra="ignore")


class BaseTemplate(Result):
    """A built-in base or a template, for a template or a sandbox to start from."""

    id: str = Field(description="Pass this as base_template or template.")
    title: str
    description: str
    kind: str = Field(description="'builtin', or 'template' for one of your team's own.")
    available: bool = Field(description="False while the host is still creating it.")


class BaseTemplates(Result):
    """Everything that a template or a sandbox can start from."""

    bases: list[BaseTemplate]


class Step(Result):
    """One step of a build."""

    number: int
    command: str = Field(description="The start of the command; recipe has all of it.")
    status: str = Field(description="pending, running, cached, succeeded, failed or skipped.")
    exit_code: int | None
    duration_ms: int | None
    refused_hosts: list[str] = Field(
        description="Hosts that the network policy blocked, even if the step succeeded."
    )
    warnings: list[str] = Field(
        description="What had no effect in the step, and what to do instead."
    )


class TemplateSummary(Result):
    """A template in a list."""

    id: str
    name: str
    status: str = Field(description="building, ready or failed.")
    base_template: str
    network: str
    error_code: str | None
    size_bytes: int | None
    created_at: str
    finished_at: str | None


class TemplateDetail(TemplateSummary):
    """A template and the state of its build."""

    recipe: list[str] = Field(description="The steps from recipe_from on, as many as fit.")
    recipe_next: int | None = Field(
        description="Pass this as get_template's recipe_from for the next steps; null at the end."
    )
    env: dict[str, str] = Field(description="The template's own variables.")
    baked_env: dict[str, str] | None = Field(
        description="All variables in the image, including its base's. A sandbox's own variables "
        "override them. Null until the image is built."
    )
    error_message: str | None
    refused_hosts: list[str] = Field(
        description="Hosts that the network policy blocked; add them to allow_domains."
    )
    queue_place: int | None = Field(description="Position in the build queue; 1 is next.")
    steps: list[Step]
    log_tail: str = Field(description="The end of the log; get_template_log has all of it.")
    next_step: str = Field(description="What to do now.")


class TemplatePage(Result):
    """A page of templates, newest first."""

    templates: list[TemplateSummary]
    next_cursor: str | None


class LogPart(Result):
    """Part of a build log."""

    text: str
    offset: int
    next_offset: int | None = Field(description="Where to continue; null at the end of the log.")


class Done(Result):
    """Confirms a change to an object."""

    id: str
    done: str


class SandboxDetail(Result):
    """A sandbox."""

    id: str
    status: str = Field(
        description="starting, running, pausing, paused, resuming, terminated or failed."
    )
    template: str
    network: str
    cpu: float
    memory_mb: int
    created_at: str
    expires_at: str = Field(description="When it expires; set_sandbox_timeout changes it.")
    metadata: dict[str, str]
    error_message: str | None
    boot_ms: float | None
    volume: str | None = Field(description="The name of the volume at /persist.")


class SandboxPage(Result):
    """A page of sandboxes, newest first."""

    sandboxes: list[SandboxDetail]
    next_cursor: str | None


class SnapshotDetail(Result):
    """A snapshot of a sandbox's files."""

    id: str = Field(description="Pass this as snapshot to create_sandbox.")
    status: str = Field(description="capturing, ready or failed.")
    name: str | None
    template: str
    size: str = Field(description="The size of every sandbox that is started from it.")
    network: str
    source_sandbox_id: str
    size_mb: int | None
    created_at: str
    error_message: str | None


class SnapshotPage(Result):
    """A page of snapshots, newest first."""

    snapshots: list[SnapshotDetail]
    next_cursor: str | None


class VolumeDetail(Result):
    """Storage that outlives sandboxes."""

    id: str
    name: str = Field(description="Pass this as volume to create_sandbox.")
    size_mb: int
    used_mb: int
    status: str = Field(description="available, attached or lost.")
    attached_sandbox_id: str | None
    expires_at: str | None = Field(description="When it is deleted with its data.")


class VolumeList(Result):
    """All volumes, newest first."""

    volumes: list[VolumeDetail]


class ExecResult(Result):
    """A command that has exited."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    omitted_bytes: int = Field(
        description="Left out of the middle of the output. To see it all, redirect the output to "
        "a file and read that in parts."
    )
    error_code: str = Field(default="", description="network_policy_blocked, or blank.")
    refused_hosts: list[str] = Field(
        default_factory=list, description="Blocked while it ran; allow_domains could allow them."
    )


class BackgroundCommand(Result):
    """A command that runs in the background, or did."""

    command_id: str
    command: str = Field(description="The beginning of it, if it is long.")
    status: Literal["running", "exited", "killed"]
    exit_code: int | None
    signal: int | None = Field(description="The number of the signal that ended it.")
    pid: int | None
    started_at: str


class BackgroundCommands(Result):
    """The background commands of a sandbox, newest first."""

    commands: list[BackgroundCommand]


class CommandOutput(BackgroundCommand):
    """A background command, and a part of its output: stdout and stderr together."""

    output: str
    next_offset: int = Field(description="Offset of what comes next.")
    more: bool = Field(description="Whether more has been printed already.")
    dropped_bytes: int = Field(description="Earlier output that is not kept any more.")


class FilePart(Result):
    """A file, or part of one."""

    path: str
    size: int = Field(description="Size of the whole file in bytes.")
    offset: int
    content: str
    encoding: str = Field(description="'utf-8', or 'base64' for bytes that aren't valid UTF-8.")
    next_offset: int | None = Field(description="Where to continue; null at the end of the file.")


class WrittenFile(Result):
    """A file that has been written."""

    path: str
    bytes_written: int


class DirectoryEntry(Result):
    """An entry of a directory."""

    name: str
    is_dir: bool
    size: int
    mode: int
    modified_at: str | None


class Directory(Result):
    """A directory."""

    path: str
    entries: list[DirectoryEntry]
    total: int = Field(description="Number of entries in the directory.")
    next_offset: int | None = Field(description="Where to continue; null at the end.")


class Size(Result):
    """A sandbox size."""

    size: str
    cpu: float
    memory_mb: int
    allowed: bool


class LimitsDetail(Result):
    """The team's limits."""

    plan: str
    sizes: list[Size]
    networks: list[str]
    max_concurrent: int = Field(description="Concurrent sandboxes.")
    max_concurrent_commands: int = Field(description="Concurrent commands across all sandboxes.")
    max_templates: int
    max_named_snapshots: int = Field(description="Snapshots that the team can keep.")
    max_concurrent_builds: int = Field(description="Builds beyond this number are queued.")
    max_timeout_seconds: int
    max_running_lifetime_seconds: int | None
    custom_egress_allowlist: bool = Field(description="Whether allow_domains can be used.")
    default_egress_domains: list[str] = Field(description="What network 'restricted' can reach.")


def template_summary(template: Template) -> TemplateSummary:
    """Summarize a template for a list."""
    return TemplateSummary.model_validate(template_presenters.template_summary(template))


def template_detail(template: Template, recipe_from: int = 1) -> TemplateDetail:
    """A template, its steps and the end of its log. Reads rows."""
    steps, place = templates.list_steps(template), templates.queue_position(template)
    detail = template_presenters.template_detail(template, steps, place)
    recipe, next_number = recipe_part(template.recipe, recipe_from)
    extra = {
        "recipe": recipe,
        "recipe_next": next_number,
        "steps": [{**step, "command": abbreviate(step["command"])} for step in detail["steps"]],
        "queue_place": place.number if place else None,
        "log_tail": log_tail(steps),
        "next_step": next_step(template),
    }
    return TemplateDetail.model_validate({**detail, **extra})


def recipe_part(recipe: list[str], start: int) -> tuple[list[str], int | None]:
    """As many steps from number ``start`` on as fit, and the number of the next one.

    A step that is too long for any result is truncated.
    """
    part: list[str] = []
    remaining = MAX_RECIPE
    for number, step in enumerate(recipe[start - 1 :], start=start):
        if len(step) > remaining and part:
            return part, number
        remaining -= len(step)
        part.append(step if len(step) <= MAX_RECIPE else truncate_step(step))
    return part, None


def truncate_step(step: str) -> str:
    """Cut a step to the longest that fits, and say how much is missing."""
    missing = len(step) - MAX_RECIPE
    return f"{step[:MAX_RECIPE]}\n[… {missing:,} more characters; GET /v1/templates/ID has them …]"


def abbreviate(command: str) -> str:
    """Cut a command to the length that a list shows."""
    return command if len(command) <= MAX_COMMAND else f"{command[:MAX_COMMAND]}…"


def log_tail(steps: list[StepOutput]) -> str:
    """The end of what the started steps have printed."""
    started = [shown for shown in steps if shown.output or shown.step.started_at]
    text = "\n".join(
        f"$ {abbreviate(shown.step.command)}\n{plain(shown.output)}" for shown in started
    )
    return text if len(text) <= LOG_TAIL else f"…{text[-LOG_TAIL:]}"


def next_step(template: Template) -> str:
    """What the agent should do now. Reads rows."""
    if template.is_ready:
        return f"Call create_sandbox with template={template.pk}.{egress_warning(template)}"
    if not template.state.is_terminal:
        return "Call wait_for_template; the build continues without you."
    on_egress = failed_on_egress(template)
    advice = " ".join(templates.direct_advice(template)) if on_egress else ""
    if template.refused_hosts and on_egress:
        return " ".join((egress_advice(template), advice)).strip()
    fix = f"Fix the failing step ({advice})" if advice else "Fix the failing step"
    return (
        f"{fix} and call create_template again; reuse_failed=true skips the steps before it. "
        "A failed template takes no slot."
    )


def egress_advice(template: Template) -> str:
    """How to reach the hosts that the policy blocked, as far as the plan allows."""
    allowed = envelope(template.team)
    if not allowed.may_list:
        return f"{allowed.allowlist_alternatives()} Then call create_template again."
    other = ', or with network="open"' if allowed.may_open else ""
    return (
        f'Call create_template again with the blocked hosts and "@default" in allow_domains{other}.'
    )


def failed_on_egress(template: Template) -> bool:
    """Whether a host was blocked for the step that failed, rather than for an earlier one."""
    if template.error_code == "network_policy_blocked":
        return True
    failed = template.steps.filter(status=StepStatus.FAILED).exclude(refused_hosts=[])
    return failed.exists()


def egress_warning(template: Template) -> str:
    """What a ready template may lack; empty if the policy blocked nothing."""
    steps = [step for step in template.steps.defer("output") if step.refused_hosts]
    if not steps:
        return ""
    hosts = list(dict.fromkeys(host for step in steps for host in step.refused_hosts))
    numbers = shorten_list([str(step.number) for step in steps])
    remedy = (
        egress_advice(template)
        if template.refused_hosts
        else "Use https addresses of public hosts, or call create_template again with "
        'network="open".'
    )
    advice = "".join(f" {sentence}" for sentence in templates.direct_advice(template))
    return (
        f" However, the network policy blocked {shorten_list(hosts)} during the build "
        f"(step {numbers}), and the build continued. Check the log to see whether everything was "
        f"installed. If not: {remedy}{advice}"
    )


def sandbox_detail(sandbox: Sandbox) -> SandboxDetail:
    """Describe a sandbox."""
    return SandboxDetail.model_validate(sandbox_presenters.sandbox_detail(sandbox))


def snapshot_detail(snapshot: Snapshot) -> SnapshotDetail:
    """Describe a snapshot."""
    return SnapshotDetail.model_validate(sandbox_presenters.snapshot_detail(snapshot))


def volume_detail(volume: Volume) -> VolumeDetail:
    """Describe a volume."""
    return VolumeDetail.model_validate(sandbox_presenters.volume_detail(volume))
