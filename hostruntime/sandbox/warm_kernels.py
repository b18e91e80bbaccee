"""Kernels that are started while their container waits for a sandbox (see :mod:`.warm_pool`).

A kernel takes seconds to start.  So where the sandboxes of a shape mostly run code, the warm
containers of that shape have the kernel of Python's default context, with its bridge, before they
are frozen.  It comes to the sandbox with the container; the sandbox's first run gives it the
variables that are the sandbox's own, and from then on it is like any other
(:mod:`hostruntime.sandbox.interpreter`).  Until then its files are in the directory of the
container's owner, and move with that::

    kernel/
      status, socket    as in a context's directory
      kernel.json       the environment that it was started with, once it is ready

Each is started by itself and not forked from another, so that no two share what programs take for
random.  What runs in a container before it is anybody's is its image's own: a ``sitecustomize``, a
startup file of IPython.  So it has no network then, a small share of the processors, and as long as
a kernel may take to start.

The memory of all that wait is limited to a sixteenth of the machine's, and their number by
``ORKESTR_WARM_KERNELS``; 0 turns this off.  A sandbox that has run no code within five minutes
loses its kernel, and gets its memory back.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter

from hostruntime.container.capacity import memory_bytes
from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import HostFault, InvalidRequest
from hostruntime.host.paths import write_json
from hostruntime.host.records import BadRecord, read_record
from hostruntime.host.tasks import in_thread
from hostruntime.sandbox.kernels import Kernels

SETTING = "ORKESTR_WARM_KERNELS"
MAXIMUM = 256
DEFAULT_CONTEXT = "default"
WAITING = "kernel"
"""The directory of one that waits, in its container's owner's."""
UNUSED_SECONDS = 300.0
# After a failure, or when an image turns out to have none, its shape is left alone for so long.
RETRY_SECONDS = 600.0
# One sandbox in so many has to run code.
_RARITY = 4
# The sandboxes of a shape that are looked at.
_LATEST = 16
_MEMORY_SHARE = 1 / 16
# What one is expected to take before any was measured.
USUAL_BYTES = 96 * 1024 * 1024
_CPU_SHARE = 1 / 8
_LANGUAGE, _CWD = "python", "/workspace"
_RECORD = "kernel.json"
_RECORDS = TypeAdapter(dict[str, str])
# Variables that take effect when a process starts, or its libraries are loaded.
_AT_START = re.compile(
    r"(?:PYTHON|LD_|LC_|IPYTHON|JUPYTER|JPY_|PYDEVD|DEBUGPY|COVERAGE_|OPENSSL_|GLIBC_|MALLOC_|XDG_)"
    r".*|LANG|LANGUAGE|TZ|HOME|PATH|TMPDIR|TEMP|TMP|USER|LOGNAME|TERM|COLUMNS|LINES|PAGER"
    r"|GIT_PAGER|CLICOLOR|NO_COLOR|FORCE_COLOR",
    re.ASCII | re.IGNORECASE,
)


@dataclass
class CodeDemand:
    """Which of the latest sandboxes of a shape have run code; ``environment`` is the shape's."""

    environment: Mapping[str, str] = field(default_factory=dict)
    latest: float = float("-inf")
    not_before: float = float("-inf")
    _claimed: deque[str] = field(default_factory=lambda: deque(maxlen=_LATEST))
    _ran: set[str] = field(default_factory=set)

    def note_claim(self, owner: str) -> None:
        """Note that there is another sandbox."""
        self._claimed.append(owner)
        self._ran &= set(self._claimed)

    def note_use(self, owner: str, environment: Mapping[str, str], now: float) -> None:
        """Note that one of them has run code for the first time."""
        if owner in self._claimed:
            self._ran.add(owner)
            self.environment, self.latest = environment, now

    def is_worth_it(self, now: float, keep_seconds: float) -> bool:
        """Whether the next sandbox is likely enough to run code."""
        recent = now - self.latest <= keep_seconds and now >= self.not_before
        return recent and len(self._ran) * _RARITY >= len(self._claimed)


@dataclass(frozen=True)
class Taken:
    """What a kernel that waits takes in memory, and its container has used of processors."""

    memory_bytes: int
    cpu_us: int


class Starter(Protocol):
    """What starts the kernels; :class:`WarmKernels`, except in tests of the pool."""

    maximum: int

    def budget(self) -> int:
        """How many bytes those that wait may take together."""

    async def start(self, owner: str, directory: Path, environment: Mapping[str, str]) -> Taken:
        """Start one in a frozen container, which is frozen again."""


@dataclass
class WarmKernels:
    """Starts kernels in warm containers."""

    containers: ContainerManager
    maximum: int = field(default_factory=lambda: configured_maximum())

    def budget(self) -> int:
        """How many bytes those that wait may take together."""
        return int(memory_bytes("MemTotal") * _MEMORY_SHARE)

    async def start(self, owner: str, directory: Path, environment: Mapping[str, str]) -> Taken:
        """Start one in a frozen container, which is frozen again.

        The container has no network from then on until it is handed over.  Raises HostError,
        OSError; then the container must be stopped.
        """
        kernels, place = Kernels(self.containers), directory / WAITING
        running = self.containers.get(owner)
        groups = cgroup_layout().container(running.name)
        before = groups.memory_bytes() or 0
        await in_thread(self.containers.pool.disconnect, owner)
        groups.set_cpu_share(_CPU_SHARE)
        await self.containers.resume(owner)
        await kernels.launch(owner, DEFAULT_CONTEXT, place, _CWD, environment)
        await kernels.start(place, _LANGUAGE, _CWD)
        started_with = kernels.environment(owner, environment)
        await in_thread(write_json, place / _RECORD, started_with)
        await self.containers.pause(owner)
        groups.set_cpu_share(1)
        after = groups.memory_bytes()
        if after is None:
            raise HostFault(f"The container of {owner} ended as its kernel was started.")
        return Taken(max(after - before, 0), groups.cpu_us())


def take(source: Path, target: Path, environment: Mapping[str, str]) -> dict[str, str] | None:
    """Make the directory of a kernel that waited that of a context; blocks.

    Returns the variables to add to its environment to have this one; None if there is no such
    kernel, or it would have to be started anew.  Raises OSError.
    """
    try:
        started_with = read_record(source / _RECORD, _RECORDS)
    except BadRecord:
        return None
    if started_with is None or needs_start(started_with, environment):
        return None
    target.parent.mkdir(mode=0o700, exist_ok=True)
    source.rename(target)
    (target / _RECORD).unlink(missing_ok=True)
    return {name: value for name, value in environment.items() if started_with.get(name) != value}


def needs_start(first: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether a process with one environment must be started anew to have the other."""
    differing = (name for name in {**first, **other} if first.get(name) != other.get(name))
    return any(name not in other or _AT_START.fullmatch(name) for name in differing)


def configured_maximum(environment: Mapping[str, str] = os.environ) -> int:
    """The number of kernels that may wait; as many as fit into their memory without a setting.

    Raises InvalidRequest for a setting that is not a number of them.
    """
    setting = environment.get(SETTING, "") or str(MAXIMUM)
    if not setting.isdecimal() or len(setting) > len(str(MAXIMUM)) or int(setting) > MAXIMUM:
        raise InvalidRequest(
            f"{SETTING} must be a whole number from 0 to {MAXIMUM}, not {setting[:20]!r}."
        )
    return int(setting)
