"""What the tools return, filled from REST's presenters."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)

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
MAX_LABELS = 300


class Result(BaseModel):
    """The base class: built from a presenter's dictionary, ignoring keys it has no field for."""

    model_config = ConfigDict(extra="ignore")


class Step(Result):
    """One step of a build; ``command`` is its beginning."""

    number: int
    command: str
    status: str
    exit_code: int | None
    duration_ms: int | None
    refused_hosts: list[str]
    warnings: list[str]


class TemplateSummary(Result):
    """A template in a list."""

    id: str
    name: str
    status: str
    base_template: str
    network: str
    error_code: str | None
    size_bytes: int | None
    created_at: str
    finished_at: str | None


class TemplateDetail(TemplateSummary):
    """A template and the state of its build.

    ``recipe`` has the steps from the requested one on, and ``recipe_next`` is the first that isn't
    shown. ``baked_env`` is None until there is an image; ``queue_place`` 1 is next.
    """

    recipe: list[str]
    recipe_next: int | None
    env: dict[str, str]
    baked_env: dict[str, str] | None
    error_message: str | None
    refused_hosts: list[str]
    queue_place: int | None
    steps: list[Step]
    log_tail: str
    next_step: str


class Rows(Result):
    """A list, under the name of what is in it."""

    model_config = ConfigDict(extra="allow")

    next_cursor: str | None = None
    hint: str | None = None

    @model_serializer(mode="wrap")
    def without_blanks(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what is there to be said: a list has little room."""
        fields: dict[str, Any] = handler(self)
        said = self.model_fields_set
        return {name: value for name, value in fields.items() if value or name in said - {"hint"}}


class LogPart(Result):
    """Part of a build log."""

    text: str
    offset: int
    next_offset: int | None


class Done(Result):
    """Confirms a change to an object."""

    id: str
    done: str


class SandboxDetail(Result):
    """A sandbox; ``sandbox`` says how long it has left, or when and why it ended."""

    id: str
    name: str | None
    status: str
    template: str
    network: str
    size: str
    cpu: float
    memory_mb: int
    created_at: str
    expires_at: str
    on_timeout: str
    ended_at: str | None
    metadata: dict[str, str]
    error_message: str | None
    volume: str | None
    sandbox: str


class SnapshotDetail(Result):
    """A snapshot of a sandbox's files."""

    id: str
    status: str
    name: str | None
    template: str
    size: str
    network: str
    source_sandbox_id: str
    size_mb: int | None
    created_at: str
    error_message: str | None


class ExecResult(Result):
    """A command that has exited; ``omitted_bytes`` were cut out of the middle of its output."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    omitted_bytes: int
    sandbox: str
    error_code: str | None = None
    refused_hosts: list[str] | None = None


class CodeRun(Result):
    """Code that has run. Figures are images beside this."""

    output: str
    context_id: str
    duration_ms: int
    sandbox: str


class BackgroundCommand(Result):
    """A command that runs in the background, or did; ``signal`` ended it."""

    command_id: str
    command: str
    status: Literal["running", "exited", "killed"]
    exit_code: int | None
    signal: int | None
    pid: int | None
    started_at: str


class BackgroundDetail(BackgroundCommand):
    """The same, how its sandbox is, and what that was refused while it ran."""

    sandbox: str
    error_code: str | None = None
    error_message: str | None = None
    refused_hosts: list[str] | None = None


class CommandOutput(BackgroundDetail):
    """A background command, and a part of its output: stdout and stderr together.

    ``more`` has been printed already; ``dropped_bytes`` before it are not kept any more.
    """

    output: str
    next_offset: int
    more: bool
    dropped_bytes: int


class FilePart(Result):
    """A file, or part of one, from ``offset`` on."""

    path: str
    size: int
    offset: int
    content: str
    encoding: Literal["utf-8", "base64"]
    next_offset: int | None
    hint: str | None
    sandbox: str


class Picture(Result):
    """What is said beside a picture."""

    path: str
    size: int
    mime_type: str
    sandbox: str


class WrittenFile(Result):
    """A file that has been written."""

    path: str
    bytes_written: int
    sandbox: str


class WrittenFiles(Result):
    """Files that have been written, or not: then there is an ``error``."""

    written: int
    failed: int
    results: list[dict[str, Any]]
    sandbox: str


class EditedFile(Result):
    """A file that has been edited, and the line of its first edit."""

    path: str
    replaced: int
    first_line: int
    size: int
    sandbox: str


class TransferAddress(Result):
    """Where a file is sent to or fetched from without a token, and how."""

    url: str
    method: str
    path: str
    expires_at: str
    example: str
    sandbox: str


class Directory(Result):
    """Some of the entries of a directory, and how many there are."""

    path: str
    entries: list[dict[str, Any]]
    total: int
    next_offset: int | None
    sandbox: str


class Preview(Result):
    """Where a port of a sandbox is seen."""

    url: str
    sandbox: str


class Egress(Result):
    """What a sandbox may reach, and what it tried to."""

    network: str
    allow_domains: list[str] | None
    hosts: list[dict[str, Any]]
    hint: str | None
    sandbox: str


class Use(Result):
    """How much of a limit is used; None if the host doesn't say."""

    used: int | None
    max: int


class LimitsDetail(Result):
    """The team's limits."""

    plan: str
    sizes: list[str]
    networks: list[str]
    use: dict[str, Use]
    max_timeout_seconds: int
    max_running_lifetime_seconds: int | None
    custom_egress_allowlist: bool
    default_egress_domains: list[str]


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


def sandbox_detail(sandbox: Sandbox, life: str) -> SandboxDetail:
    """Describe a sandbox."""
    detail = sandbox_presenters.sandbox_detail(sandbox)
    name = sandbox.metadata.get("name")
    return SandboxDetail.model_validate({**detail, "name": name, "sandbox": life})


def sandbox_row(sandbox: Sandbox, life: str) -> dict[str, Any]:
    """A sandbox in a list, with as much of its labels as there is room for."""
    row = {
        "id": sandbox.pk,
        "template": sandbox.template,
        "network": sandbox.network,
        "size": sandbox.size,
        "sandbox": life,
    }
    labels: dict[str, str] = {}
    room = MAX_LABELS
    for name, value in sandbox.metadata.items():
        room -= len(name) + len(value)
        if room < 0:
            labels["…"] = "get_sandbox has all"
            break
        labels[name] = value
    return {**row, "metadata": labels} if labels else row


def template_row(template: Template) -> dict[str, Any]:
    """A template in a list."""
    fields = template_summary(template).model_dump()
    return {name: value for name, value in fields.items() if value is not None}


def snapshot_row(snapshot: Snapshot) -> dict[str, Any]:
    """A snapshot in a list."""
    fields = snapshot_detail(snapshot).model_dump()
    return {name: value for name, value in fields.items() if value is not None}


def snapshot_detail(snapshot: Snapshot) -> SnapshotDetail:
    """Describe a snapshot."""
    return SnapshotDetail.model_validate(sandbox_presenters.snapshot_detail(snapshot))


def volume_row(volume: Volume) -> dict[str, Any]:
    """A volume in a list."""
    shown = ("id", "name", "size_mb", "used_mb", "status", "attached_sandbox_id", "expires_at")
    detail: dict[str, Any] = {**sandbox_presenters.volume_detail(volume)}
    return {name: detail[name] for name in shown if detail[name] is not None}
