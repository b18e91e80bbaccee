"""The shapes of what REST answers about templates; :mod:`templates_app.presenters` makes them."""

from __future__ import annotations

from typing import Annotated, TypedDict

from pydantic import ConfigDict, Field, with_config

from orkestr_console.http.describing import one_of
from orkestr_console.http.json_api import Timestamp
from templates_app.models import Network, Reuse, StepStatus, TemplateStatus


class BaseDetail(TypedDict):
    """A built-in base image."""

    id: str
    title: str
    description: str
    state: Annotated[str, one_of(("ready", "missing", "building", "failed"))]
    on_request: Annotated[
        bool,
        Field(description="Whether it is made when a template or sandbox is first made from it."),
    ]
    size_bytes: int | None
    progress: Annotated[str | None, Field(description="What is being done, while it is building.")]
    error: Annotated[str | None, Field(description="Why it could not be made.")]


class BaseList(TypedDict):
    """The built-in base images."""

    bases: list[BaseDetail]


class TemplateSummary(TypedDict):
    """A template in a list."""

    id: str
    name: str
    status: Annotated[str, one_of(TemplateStatus.values)]
    base_template: str
    recipe: list[str]
    network: Annotated[str, one_of(Network.values)]
    allow_domains: list[str] | None
    env: dict[str, str]
    refused_hosts: Annotated[
        list[str], Field(description="What the build was not allowed to reach.")
    ]
    error_message: str | None
    error_code: str | None
    size_bytes: int | None
    file_count: int | None
    shared_bytes: Annotated[int | None, Field(description="The part that its base has as well.")]
    build_ms: float | None
    digest: str | None
    step_timeout_seconds: int | None
    build_timeout_seconds: int | None
    disk_mb: int | None
    reuse: Annotated[str, one_of(Reuse.values)] | None
    created_at: Timestamp
    started_at: Timestamp | None
    finished_at: Timestamp | None
    ready_at: Timestamp | None
    last_used_at: Timestamp | None


class TemplateList(TypedDict):
    """A page of templates, newest first."""

    templates: list[TemplateSummary]
    next_cursor: str | None


class Queue(TypedDict):
    """A build's place in the queue, and what it waits for."""

    place: int
    waits_for: str


class StepDetail(TypedDict):
    """One step of a build."""

    number: int
    command: str
    status: Annotated[str, one_of(StepStatus.values)]
    started_at: Timestamp | None
    duration_ms: int | None
    exit_code: int | None
    signal: int | None
    output: str
    output_truncated: bool
    output_bytes: int
    elided_bytes: int
    added_bytes: int | None
    added_files: int | None
    refused_hosts: list[str]
    cached_at: Timestamp | None
    warnings: list[str]


class TemplateDetail(TemplateSummary):
    """A template with the steps of its build; `queue` while it waits."""

    baked_env: Annotated[
        dict[str, str] | None, Field(description="The image's environment, once it is built.")
    ]
    queue: Queue | None
    steps: list[StepDetail]


@with_config(ConfigDict(extra="allow"))
class BuildEvent(TypedDict):
    """One event of a build; what it has besides these depends on its kind."""

    seq: int
    kind: str
    at: Timestamp


class EventList(TypedDict):
    """A page of events, and the number to go on after."""

    events: list[BuildEvent]
    next_after: int
    ended: Annotated[bool, Field(description="Whether the build is over and these were its last.")]


class PackageDetail(TypedDict):
    """A package in an image."""

    name: str
    version: str


class StepAdded(TypedDict):
    """What a step added to the image; null if that is not known."""

    number: int
    command: str
    added_bytes: int | None
    added_files: int | None
    cached: bool


class Scrubbed(TypedDict):
    """What was removed before the image was kept."""

    what: str
    bytes: int
    files: int


class ContentsDetail(TypedDict):
    """What is in an image; packages by package manager."""

    template_id: str
    digest: str | None
    size_bytes: int | None
    file_count: int | None
    shared_bytes: int | None
    packages: dict[str, list[PackageDetail]]
    packages_truncated: bool
    steps: list[StepAdded]
    scrub_removed: list[Scrubbed]


class ChangedPackage(TypedDict):
    """The versions of a package in both images."""

    name: str
    a: str
    b: str


class PackagesCompared(TypedDict):
    """How one manager's packages differ."""

    only_in_a: list[PackageDetail]
    only_in_b: list[PackageDetail]
    changed: list[ChangedPackage]
    same: int


class Compared(TypedDict):
    """A measure of both images."""

    a: int | None
    b: int | None


class StepsCompared(TypedDict):
    """The steps with the same number; null where a recipe is shorter."""

    number: int
    same_command: bool
    a: StepAdded | None
    b: StepAdded | None


class DifferenceDetail(TypedDict):
    """How two images differ; `a` is the requested one, `b` that of `compare`."""

    a: str
    b: str
    same_image: bool
    packages: dict[str, PackagesCompared]
    sizes: dict[str, Compared]
    steps: list[StepsCompared]
