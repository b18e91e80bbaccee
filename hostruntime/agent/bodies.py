"""The bodies the agent accepts, and how a bad one is explained."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.requests import Request

from hostruntime.container.exec import shell
from hostruntime.errors import InvalidRequest
from hostruntime.host.quotas import Quota
from hostruntime.image.environment import check_environment
from hostruntime.sandbox.manager import SandboxRequest

MAX_TIMEOUT_SECONDS = 86_400.0
_DEFAULT_EXEC_TIMEOUT_SECONDS = 60.0
Seconds = Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)]
Cpu = Annotated[float, Field(ge=0.1, le=256)]
DiskMb = Annotated[int, Field(ge=16, le=1024 * 1024)]
MemoryMb = Annotated[int, Field(ge=32, le=1024 * 1024)]


class Body(BaseModel):
    """Base of the bodies: no field that is not known, no value of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LimitsBody(Body):
    """The resources of a container."""

    cpu: Cpu
    memory_mb: MemoryMb
    disk_mb: DiskMb | None = None


class SandboxBody(Body):
    """``POST /sandboxes``."""

    id: str
    image: str | None = None
    snapshot: str | None = None
    limits: LimitsBody
    network: str = "off"
    allow_domains: list[str] | None = None
    env: dict[str, str] = {}
    deadline: float | None = None

    @model_validator(mode="after")
    def _one_source(self) -> SandboxBody:
        if (self.image is None) == (self.snapshot is None):
            raise ValueError("give either image or snapshot")
        return self

    def request(self) -> SandboxRequest:
        """What the sandbox manager takes."""
        domains = self.allow_domains
        return SandboxRequest(
            id=self.id,
            image=self.image or "",
            snapshot=self.snapshot,
            network=self.network,
            allow_domains=None if domains is None else tuple(domains),
            cpu=self.limits.cpu,
            memory_mb=self.limits.memory_mb,
            disk_mb=self.limits.disk_mb,
            env=self.env,
            deadline=self.deadline,
        )


class CollectedBody(Body):
    """``POST /usage/collected``."""

    ids: list[str]


class SnapshotBody(Body):
    """``POST /sandboxes/{id}/snapshots``."""

    id: str


class DeadlineBody(Body):
    """``PATCH /sandboxes/{id}``, and ``POST`` to its ``pause`` and ``resume``."""

    deadline: float | None


class QuotaBody(Body):
    """How many commands of a scope may run at once (:mod:`hostruntime.host.quotas`)."""

    scope: Annotated[str, Field(min_length=1, max_length=128)]
    most: Annotated[int, Field(ge=0)]


class ExecBody(Body):
    """``POST /sandboxes/{id}/exec``: a ``command`` for the shell, or an ``argv``."""

    command: str | None = None
    argv: list[str] | None = Field(default=None, min_length=1)
    cwd: str = "/workspace"
    env: dict[str, str] = {}
    timeout_seconds: Seconds | None = _DEFAULT_EXEC_TIMEOUT_SECONDS
    max_output_bytes: Annotated[int, Field(ge=0)] | None = None
    quota: QuotaBody | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ExecBody:
        if (self.command is None) == (self.argv is None):
            raise ValueError("give either command or argv")
        if "\0" in "".join([self.command or "", self.cwd, *(self.argv or ())]):
            raise ValueError("a command cannot contain a NUL character")
        check_environment(self.env)
        return self

    def words(self) -> list[str]:
        """The argv to run."""
        return self.argv if self.argv is not None else shell(self.command or "")

    def of_scope(self) -> Quota | None:
        """What it counts against."""
        return None if self.quota is None else Quota(self.quota.scope, self.quota.most)


class MkdirBody(Body):
    """``POST /sandboxes/{id}/files/mkdir``."""

    path: str
    parents: bool = True


class MoveBody(Body):
    """``POST /sandboxes/{id}/files/move``."""

    source: str
    destination: str


async def read_body[T: Body](request: Request, model: type[T]) -> T:
    """The request's JSON body as ``model``; raises InvalidRequest with one sentence."""
    try:
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(f"{where + ': ' if where else ''}{first['msg']}.") from error
