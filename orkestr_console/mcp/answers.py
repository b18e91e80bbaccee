"""What the tools answer: the schemas that agents are shown, filled from REST's own presenters."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from orkestr_console.accounts.limits import envelope
from orkestr_console.core.text import plain, shorten_list
from sandboxes_app import presenters as sandbox_presenters
from sandboxes_app.models import Sandbox, Snapshot
from templates_app import presenters as template_presenters
from templates_app import services as templates
from templates_app.models import StepStatus, Template
from templates_app.services import StepOutput

LOG_TAIL = 4_000  # characters
# How much of a recipe goes with a template, in characters.
MOST_RECIPE = 16_000
LONGEST_COMMAND = 200


class Answer(BaseModel):
    """The root of the answers: made of a presenter's dictionary, of which it takes its own."""

    model_config = ConfigDict(extra="ignore")


class BaseAnswer(Answer):
    """Something that a template or a sandbox can start from."""

    id: str = Field(description="Pass this as base_template or template.")
    title: str
    description: str
    kind: str = Field(description="'builtin', or 'template' for one of your team's own.")
    available: bool = Field(description="False while the host is still creating it.")


class Bases(Answer):
    """What there is to start from."""

    bases: list[BaseAnswer]


class StepAnswer(Answer):
    """One step of a build."""

    number: int
    command: str = Field(description="Its beginning; the recipe has all of it.")
    status: str = Field(description="pending, running, cached, succeeded, failed or skipped.")
    exit_code: int | None
    duration_ms: int | None
    refused_hosts: list[str] = Field(
        description="Hosts that the network policy refused, even if the step succeeded."
    )
    warnings: list[str] = Field(
        description="What had no effect in the step, and what to do instead."
    )


class TemplateLine(Answer):
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


class TemplateAnswer(TemplateLine):
    """A template and how its build goes."""

    recipe: list[str] = Field(description="The steps from recipe_from onwards, as many as fit.")
    recipe_next: int | None = Field(
        description="get_template's recipe_from for the steps after these; null at the end."
    )
    env: dict[str, str] = Field(description="The template's own variables.")
    baked_env: dict[str, str] | None = Field(
        description="All that the image has baked in, its base's variables too; a sandbox's own "
        "come over it. Null until it is built."
    )
    error_message: str | None
    refused_hosts: list[str] = Field(
        description="Hosts that the network policy refused; add them to allow_domains."
    )
    queue_place: int | None = Field(description="Its place while it waits for its turn; 1 is next.")
    steps: list[StepAnswer]
    log_tail: str = Field(description="The end of the log; get_template_log has the rest.")
    next_step: str = Field(description="What to do now.")


class Templates(Answer):
    """A page of templates, newest first."""

    templates: list[TemplateLine]
    next_cursor: str | None


class LogPart(Answer):
    """A part of a build's log."""

    text: str
    offset: int
    next_offset: int | None = Field(description="Where to continue; null at the end of the log.")


class Done(Answer):
    """Something was done."""

    id: str
    done: str


class SandboxAnswer(Answer):
    """A sandbox."""

    id: str
    status: str = Field(description="starting, running, terminated or failed.")
    template: str
    network: str
    cpu: float
    memory_mb: int
    created_at: str
    expires_at: str = Field(description="When it expires; set_sandbox_timeout changes it.")
    metadata: dict[str, str]
    error_message: str | None
    boot_ms: float | None


class Sandboxes(Answer):
    """A page of sandboxes, newest first."""

    sandboxes: list[SandboxAnswer]
    next_cursor: str | None


class SnapshotAnswer(Answer):
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


class Snapshots(Answer):
    """A page of snapshots, newest first."""

    snapshots: list[SnapshotAnswer]
    next_cursor: str | None


class ExecResult(Answer):
    """A command that ended."""

    exit_code: int
    stdout: str
    stderr: str
    duration_ms: int
    omitted_bytes: int = Field(
        description="Left out of the middle of the output. Redirect to a file and read parts of it."
    )


class Background(Answer):
    """A command that runs on."""

    pid: int = Field(description="Its session's leader: 'kill -- -PID' ends all of it.")
    log_path: str = Field(description="Its output; read it with read_file.")
    exit_code_path: str = Field(description="Exists once it has ended; holds its exit code.")


class FilePart(Answer):
    """A file, or a part of it."""

    path: str
    size: int = Field(description="Of the whole file, in bytes.")
    offset: int
    content: str
    encoding: str = Field(description="'utf-8', or 'base64' for bytes that aren't valid UTF-8.")
    next_offset: int | None = Field(description="Where to continue; null at the end of the file.")


class Written(Answer):
    """A file that was written."""

    path: str
    bytes_written: int


class DirectoryEntry(Answer):
    """An entry of a directory."""

    name: str
    is_dir: bool
    size: int
    mode: int
    modified_at: str | None


class Directory(Answer):
    """A directory."""

    path: str
    entries: list[DirectoryEntry]
    total: int = Field(description="How many entries the directory has.")
    next_offset: int | None = Field(description="Where to continue; null at the end.")


class Size(Answer):
    """A size of sandboxes."""

    size: str
    cpu: float
    memory_mb: int
    allowed: bool


class LimitsAnswer(Answer):
    """What the team may have."""

    plan: str
    sizes: list[Size]
    networks: list[str]
    max_concurrent: int = Field(description="Concurrent sandboxes.")
    max_concurrent_commands: int = Field(description="Concurrent commands, in all sandboxes.")
    max_templates: int
    max_named_snapshots: int = Field(description="Snapshots that the team can keep.")
    max_concurrent_builds: int = Field(description="More wait for their turn.")
    max_timeout_seconds: int
    max_running_lifetime_seconds: int | None
    custom_egress_allowlist: bool = Field(description="Whether allow_domains can be used.")
    default_egress_domains: list[str] = Field(description="What network 'restricted' reaches.")


def template_line(template: Template) -> TemplateLine:
    """A template in a list."""
    return TemplateLine.model_validate(template_presenters.template_summary(template))


def template_answer(template: Template, recipe_from: int = 1) -> TemplateAnswer:
    """A template, its steps and the end of its log. Reads rows."""
    steps, place = templates.list_steps(template), templates.queue_position(template)
    said = template_presenters.template_detail(template, steps, place)
    recipe, following = recipe_part(template.recipe, recipe_from)
    extra = {
        "recipe": recipe,
        "recipe_next": following,
        "steps": [{**step, "command": shortened(step["command"])} for step in said["steps"]],
        "queue_place": place.number if place else None,
        "log_tail": log_tail(steps),
        "next_step": next_step(template),
    }
    return TemplateAnswer.model_validate({**said, **extra})


def recipe_part(recipe: list[str], begin: int) -> tuple[list[str], int | None]:
    """The steps from number ``begin`` on that fit, and the number of the first that does not.

    Of one that no answer has room for it is the beginning.
    """
    part: list[str] = []
    room = MOST_RECIPE
    for number, step in enumerate(recipe[begin - 1 :], start=begin):
        if len(step) > room and part:
            return part, number
        room -= len(step)
        part.append(step if len(step) <= MOST_RECIPE else beginning(step))
    return part, None


def beginning(step: str) -> str:
    """As much of a long step as an answer has room for, and how much is missing."""
    left = len(step) - MOST_RECIPE
    return f"{step[:MOST_RECIPE]}\n[… {left:,} more characters; GET /v1/templates/ID has them …]"


def shortened(command: str) -> str:
    """The beginning of a step."""
    return command if len(command) <= LONGEST_COMMAND else f"{command[:LONGEST_COMMAND]}…"


def log_tail(steps: list[StepOutput]) -> str:
    """The last of what the steps that have begun printed."""
    begun = [shown for shown in steps if shown.output or shown.step.started_at]
    text = "\n".join(f"$ {shortened(shown.step.command)}\n{plain(shown.output)}" for shown in begun)
    return text if len(text) <= LOG_TAIL else f"…{text[-LOG_TAIL:]}"


def next_step(template: Template) -> str:
    """What an agent would do now. Reads rows."""
    if template.is_ready:
        return f"Call create_sandbox with template={template.pk}.{warning(template)}"
    if not template.state.is_terminal:
        return "Call wait_for_template; the build continues without you."
    for_network = failed_for_network(template)
    advice = " ".join(templates.direct_advice(template)) if for_network else ""
    if template.refused_hosts and for_network:
        return " ".join((to_be_reached(template), advice)).strip()
    mend = f"Fix the failing step ({advice})" if advice else "Fix the failing step"
    return (
        f"{mend} and call create_template again; with reuse_failed=true the steps "
        "before it are not run again. A failed template takes no slot."
    )


def to_be_reached(template: Template) -> str:
    """How the hosts that a build was refused could be reached, as far as the plan goes."""
    allowed = envelope(template.team)
    if not allowed.may_list:
        return f"{allowed.allowlist_alternatives()} Then call create_template again."
    other = ', or with network="open"' if allowed.may_open else ""
    return (
        f'Call create_template again with the refused hosts and "@default" in allow_domains{other}.'
    )


def failed_for_network(template: Template) -> bool:
    """Whether the step that failed was refused something, rather than one that went on."""
    if template.error_code == "network_policy_blocked":
        return True
    failed = template.steps.filter(status=StepStatus.FAILED).exclude(refused_hosts=[])
    return failed.exists()


def warning(template: Template) -> str:
    """What a template that is ready may lack; empty if nothing was refused."""
    steps = [step for step in template.steps.defer("output") if step.refused_hosts]
    if not steps:
        return ""
    hosts = list(dict.fromkeys(host for step in steps for host in step.refused_hosts))
    numbers = shorten_list([str(step.number) for step in steps])
    remedy = (
        to_be_reached(template)
        if template.refused_hosts
        else "Use https addresses of public hosts, or call create_template again with "
        'network="open".'
    )
    advice = "".join(f" {sentence}" for sentence in templates.direct_advice(template))
    return (
        f" But the network policy refused {shorten_list(hosts)} while it was built "
        f"(step {numbers}), and the build went on: look at the log "
        "whether the image has what the recipe was to "
        f"install. If not: {remedy}{advice}"
    )


def sandbox_answer(sandbox: Sandbox) -> SandboxAnswer:
    """A sandbox."""
    said: dict[str, Any] = sandbox_presenters.sandbox_detail(sandbox)
    return SandboxAnswer.model_validate(said)


def snapshot_answer(snapshot: Snapshot) -> SnapshotAnswer:
    """A snapshot."""
    said: dict[str, Any] = sandbox_presenters.snapshot_detail(snapshot)
    return SnapshotAnswer.model_validate(said)
