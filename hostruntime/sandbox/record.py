"""The record of a sandbox: ``sandbox.json`` in its directory, as a new agent finds it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from hostruntime.container.manager import RunningContainer
from hostruntime.errors import InvalidRequest
from hostruntime.host import clock
from hostruntime.host.paths import Instance
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.image.environment import check_environment
from hostruntime.image.store import ImageStore
from hostruntime.network.policy import Policy, PolicyError
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo

Reason = Literal["expired", "exited", "host_lost", "out_of_disk"]
RECORD_FILE = "sandbox.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Sandbox:
    """The current state of a sandbox."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    request: CreateSandbox
    state: Literal["starting", "running", "gone"]
    image_id: str
    image_tree: str
    deadline: float | None
    # The effective deadline by :mod:`hostruntime.host.clock`, and the boot that it belongs to.
    due: float | None = None
    boot: str = ""
    started_at: float = 0.0
    boot_ms: float = 0.0
    reason: Reason | None = None
    ended_at: float | None = None
    slot: Mapping[str, Any] | None = None
    paused: bool = False
    # The name of its container, if it was started for another owner.
    container: str = ""
    # The environment variables of its image (hostruntime.image.environment).
    image_env: Mapping[str, str] = field(default_factory=dict)

    def info(self, *, held: bool) -> SandboxInfo:
        """The sandbox as the agent's API returns it."""
        return SandboxInfo(
            id=self.request.id,
            image=self.request.image,
            state=self.state,
            started_at=self.started_at,
            boot_ms=round(self.boot_ms, 2),
            deadline=self.deadline if self.state == "gone" else self.ends_at,
            network=self.request.network,
            reason=self.reason,
            ended_at=self.ended_at,
            paused=self.paused,
            held=held,
            volume=self.request.volume.id if self.request.volume is not None else None,
        )

    def container_name(self, instance: Instance) -> str:
        """The name of its container (:meth:`ContainerManager.name_of`)."""
        return self.container or instance.container_name(self.request.id)

    @property
    def ends_at(self) -> float | None:
        """When it ends, in Unix seconds by the current wall clock."""
        current = clock.to_wall_clock(self.due)
        # Exactly as requested, unless the clock has been set since.
        unchanged = (
            current is not None and self.deadline is not None and abs(current - self.deadline) < 1
        )
        return self.deadline if unchanged else current

    @property
    def is_expired(self) -> bool:
        """Whether its deadline has passed, however the clock was set meanwhile."""
        return self.due is not None and self.due <= clock.elapsed()

    def with_deadline(self, deadline: float | None) -> Sandbox:
        """The same with another deadline, in Unix seconds."""
        due = clock.to_boottime(deadline)
        return replace(self, deadline=deadline, due=due, boot=clock.boot_id())


def attached_volumes(running: Iterable[Sandbox]) -> dict[str, str]:
    """Which of these sandboxes has which volume, by the volume's id."""
    return {
        sandbox.request.volume.id: sandbox.request.id
        for sandbox in running
        if sandbox.request.volume is not None
    }


_SANDBOX = TypeAdapter(Sandbox)


def read_sandbox(directory: Path) -> Sandbox | None:
    """Read the record in a sandbox's directory; None if there is none.  Raises BadRecord."""
    path = directory / RECORD_FILE
    sandbox = read_record(path, _SANDBOX)
    if sandbox is None:
        return None
    if sandbox.request.id != directory.name:
        raise BadRecord(path, f"it is the record of {sandbox.request.id[:100]!r}")
    try:
        policy_of(sandbox.request)
    except InvalidRequest as error:
        raise BadRecord(path, error.detail) from error
    return sandbox


def policy_of(request: CreateSandbox) -> Policy:
    """Validate a request and return its network policy.  Raises InvalidRequest."""
    if _ID.fullmatch(request.id) is None:
        raise InvalidRequest(f"{request.id[:80]!r} is not a sandbox id: use letters, digits, _, -.")
    check_environment(request.env)
    try:
        return Policy.parse(request.network, request.allow_domains)
    except PolicyError as error:
        raise InvalidRequest(str(error)) from error


def read_records(sandboxes: Path, store: ImageStore) -> list[Sandbox]:
    """The previous agent's records; damaged ones are set aside, unfinished ones discarded."""
    records = []
    for directory in sorted(sandboxes.iterdir()):
        try:
            sandbox = read_sandbox(directory)
        except BadRecord as error:
            # Its container has been stopped: the cleanup at start treats it as unowned, too.
            store.quarantine.add_damaged(directory, "sandbox", error.detail)
            continue
        # Without a record, the agent died before it ran. Earlier agents recorded "starting", too;
        # it was never reported to anybody.
        if sandbox is None or sandbox.state == "starting":
            store.trash.discard(directory)
            continue
        records.append(sandbox)
    return records


def as_running(sandbox: Sandbox, running: RunningContainer) -> Sandbox:
    """The sandbox, now that its container runs."""
    return replace(
        sandbox,
        state="running",
        started_at=running.started_at,
        boot_ms=running.boot_ms,
        slot={"index": running.slot.index, "address": running.slot.address},
        container=running.name,
    )
