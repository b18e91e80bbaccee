"""Warm containers: started before a sandbox needs them, so that creating it is a claim.

A warm container was started from an image with certain limits and a network policy (its *shape*),
and is frozen: only its init is in it.  The first sandbox of the same shape gets it under the
sandbox's own id, which takes some milliseconds; everything else about it is as if it had been
started at that moment (:meth:`ContainerManager.hand_over`).  The environment of a sandbox is not
part of its shape, as it is given to each command.

How many there are follows demand: one of each shape requested lately, and as many as were requested
within a minute.  ``ORKESTR_WARM_CONTAINERS`` limits all of them together; 0 turns this off.  They
never take anything from sandboxes and builds: they have no record, no meter and no use of their
image, the oldest is stopped if a slot is missing, and all are while memory or disk space is short.

Where most sandboxes of a shape run code, its containers get a kernel (:mod:`.warm_kernels`), one
container after the other, and only once there are as many containers as there should be.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from hostruntime.container.capacity import memory_bytes
from hostruntime.container.limits import Limits
from hostruntime.container.manager import ContainerManager, ContainerSpec, RunningContainer
from hostruntime.errors import HostError, HostFull, InvalidRequest
from hostruntime.host.paths import StatePaths
from hostruntime.host.tasks import (
    cancel_and_wait,
    every,
    in_background,
    in_thread,
    log_errors,
    run_to_completion,
)
from hostruntime.image.identity import write_identity
from hostruntime.image.trash import Trash
from hostruntime.network.policy import Policy
from hostruntime.sandbox.warm_kernels import (
    RETRY_SECONDS,
    UNUSED_SECONDS,
    USUAL_BYTES,
    CodeDemand,
    Starter,
    Taken,
    WarmKernels,
)

SETTING = "ORKESTR_WARM_CONTAINERS"
# A sandbox's id contains no dot, so no sandbox has such a name.
PREFIX = "warm."
# How long after its last request a shape is kept ready.
KEEP_SECONDS = 900.0
# A shape is kept ready as often as it was requested within this time.
_DEMAND_SECONDS = 60.0
_CHECK_SECONDS = 5.0
# Whoever creates a sandbox mostly runs a command in it at once, which takes half as long again
# while a container is being started.  So none is until nobody has claimed one for a moment, but
# those who come one after the other do not wait for theirs for long.
QUIET_SECONDS, MAX_WAIT_SECONDS = 0.1, 0.25
_MAX_DEFAULT, _GIB_PER_CONTAINER = 8, 2
MAXIMUM = 256
# Below this share of the machine's memory there are none.
_MIN_MEMORY_SHARE = 0.1
# Of whom it is known which shape they have: a first run comes soon after its sandbox.
_MAX_CLAIMED = 1024
# An agent that ends is to do so soon.
_STOPS_AT_ONCE = 4
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shape:
    """What containers have in common that can replace each other.

    ``identity`` tells the image's tree from a later one at the same path.
    """

    tree: Path
    identity: tuple[int, int]
    policy: Policy
    limits: Limits

    @classmethod
    def of(cls, spec: ContainerSpec) -> Shape:
        """The shape of a container.  Raises OSError if its image's tree does not exist."""
        return cls(spec.image_tree, _identity(spec.image_tree), spec.policy, spec.limits)

    def is_current(self) -> bool:
        """Whether the image's tree still exists."""
        try:
            return _identity(self.tree) == self.identity
        except OSError:
            return False


def _identity(tree: Path) -> tuple[int, int]:
    status = tree.stat()
    return status.st_ino, status.st_ctime_ns


@dataclass
class _Demand:
    """The requests for one shape within the last minute, and the time of the last one."""

    latest: float = 0.0
    recent: deque[float] = field(default_factory=deque)
    code: CodeDemand = field(default_factory=CodeDemand)
    # What its last kernel took.
    kernel_bytes: int = USUAL_BYTES

    def record(self, now: float) -> None:
        self.latest = now
        self.recent.append(now)

    def count(self, now: float) -> int:
        while self.recent and self.recent[0] < now - _DEMAND_SECONDS:
            self.recent.popleft()
        return max(len(self.recent), 1)


@dataclass
class WarmPool:
    """The warm containers of one host.  For use on one event loop."""

    paths: StatePaths
    containers: ContainerManager
    trash: Trash
    maximum: int = field(default_factory=lambda: configured_maximum())
    # In seconds, like time.monotonic and asyncio.sleep.
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    kernels: Starter = field(init=False)
    # Ends a kernel that a sandbox got and has not used; the sandbox may be gone.
    end_unused: Callable[[str], Awaitable[None]] | None = None
    _ready: dict[Shape, deque[str]] = field(default_factory=dict)
    _demand: dict[Shape, _Demand] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    # Since when there have been fewer than there should be, because some were claimed.
    _behind_since: float | None = None
    _task: asyncio.Task[None] | None = None
    # The latest sandboxes, and when those that got a kernel, and have not used it, did.
    _claimed: dict[str, Shape] = field(default_factory=dict)
    _unused: dict[str, float] = field(default_factory=dict)
    # Those that wait with a kernel, and what it takes; and the one that is getting one.
    _kernels: dict[str, Taken] = field(default_factory=dict)
    _getting_kernel: tuple[Shape, str] | None = None
    _starting: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.kernels = WarmKernels(self.containers)

    # Lifecycle -----------------------------------------------------------------------------

    def start(self) -> None:
        """Start containers, and stop those that are not needed, until :meth:`close`."""
        if self.maximum:
            self.containers.stop_spare = self.stop_one
            self.containers.on_exit.append(self._on_exit)
            self._task = every(0.0, self._maintain, "the warm containers could not be maintained")

    async def close(self) -> None:
        """Stop all warm containers."""
        self.containers.stop_spare = None
        await cancel_and_wait(self._task)
        self._demand.clear()
        await self.stop_all()

    # Use -----------------------------------------------------------------------------------

    async def claim(self, spec: ContainerSpec) -> RunningContainer | None:
        """A warm container that is now ``spec``'s, or None: it has to be started.

        The sandbox must already use its image, so that the tree is not deleted meanwhile.
        """
        if not self.maximum:
            return None
        shape = await in_thread(Shape.of, spec)
        now = self.clock()
        self._note_claim(spec.owner, shape, now)
        self._behind_since = now if self._behind_since is None else self._behind_since
        try:
            while ready := self._ready.get(shape):
                owner = ready.popleft()
                kernel = self._kernels.pop(owner, None)
                try:
                    container = await self.containers.hand_over(owner, spec)
                    if kernel is None:
                        return container
                    self._unused[spec.owner] = now
                    return replace(container, cpu_us_before=kernel.cpu_us)
                except (HostError, OSError) as error:
                    # It may have been killed for lack of memory, for example.
                    _log.warning("%s could not become %s: %s", owner, spec.owner, error)
                    await self._stop(owner)
            return None
        finally:
            self._changed.set()

    def _note_claim(self, sandbox: str, shape: Shape, now: float) -> None:
        demand = self._demand.setdefault(shape, _Demand())
        demand.record(now)
        demand.code.note_claim(sandbox)
        self._claimed[sandbox] = shape
        if len(self._claimed) > _MAX_CLAIMED:
            del self._claimed[next(iter(self._claimed))]

    def note_code(self, sandbox: str, environment: Mapping[str, str]) -> None:
        """Note that a sandbox has run its first code.

        ``environment`` is that of a kernel of its shape, without what is the sandbox's own.
        """
        self._unused.pop(sandbox, None)
        shape = self._claimed.get(sandbox)
        if shape is not None and shape in self._demand:
            self._demand[shape].code.note_use(sandbox, environment, self.clock())
            self._changed.set()

    def count(self) -> int:
        """How many are ready."""
        return sum(map(len, self._ready.values()))

    async def stop_one(self) -> bool:
        """Stop the one least likely to be needed; False if there is none."""
        for shape in sorted(self._ready, key=self._latest):
            if self._ready[shape]:
                await self._stop(self._ready[shape].pop())
                return True
        return await self._stop_starting()

    async def stop_all(self) -> None:
        """Stop all of them; as many as are in demand are started again soon."""
        await asyncio.gather(*(self._stop_rest() for _ in range(_STOPS_AT_ONCE)))

    async def _stop_rest(self) -> None:
        while await self.stop_one():
            pass

    async def _on_exit(self, owner: str) -> None:
        """Replace one that has exited by itself, for lack of memory perhaps."""
        for ready in self._ready.values():
            if owner in ready:
                ready.remove(owner)
                await self._stop(owner)
                self._changed.set()
                return

    # Kernels -------------------------------------------------------------------------------

    def count_kernels(self) -> int:
        """How many of those that are ready have a kernel."""
        return len(self._kernels)

    def _start_kernel(self, shapes: Iterable[Shape]) -> None:
        """Begin to start a kernel in a container that should have one, unless that goes on."""
        if self._getting_kernel is not None or self.count_kernels() >= self.kernels.maximum:
            return
        left = self._kernel_bytes_left()
        for shape in shapes:
            demand, ready = self._demand[shape], self._ready.get(shape, deque())
            worth_it = demand.code.is_worth_it(self.clock(), KEEP_SECONDS)
            if demand.kernel_bytes > left or not worth_it:
                continue
            owner = next((each for each in ready if each not in self._kernels), None)
            if owner is not None:
                ready.remove(owner)
                self._getting_kernel = shape, owner
                work = self._give_kernel(shape, owner, demand)
                self._starting = in_background(work, f"no kernel could be started in {owner}")
                return

    async def _give_kernel(self, shape: Shape, owner: str, demand: _Demand) -> None:
        """Start a kernel in a container, which is ready again then, or stopped."""
        place, done = self.paths.warm / owner, False
        try:
            taken = await self.kernels.start(owner, place, demand.code.environment)
            demand.kernel_bytes = taken.memory_bytes
            wanted = shape in self._demand and await in_thread(shape.is_current)
            # An image can have it take anything.
            done = wanted and taken.memory_bytes <= self._kernel_bytes_left()
            if done:
                self._kernels[owner] = taken
                # Before those that have none.
                self._ready.setdefault(shape, deque()).appendleft(owner)
        except Exception as error:
            demand.code.not_before = self.clock() + RETRY_SECONDS
            if not isinstance(error, HostError | OSError):
                raise
            _log.info("the warm container %s has no kernel: %s", owner, error)
        finally:
            try:
                if not done:
                    await run_to_completion(self._stop(owner))
            finally:
                self._getting_kernel = None
                self._changed.set()

    def _kernel_bytes_left(self) -> int:
        return self.kernels.budget() - sum(each.memory_bytes for each in self._kernels.values())

    async def _stop_starting(self) -> bool:
        """Stop the container that is getting a kernel; False if there is none."""
        if self._getting_kernel is None:
            return False
        await cancel_and_wait(self._starting)
        # What is cancelled before it has begun does nothing.
        if self._getting_kernel is not None:
            _, owner = self._getting_kernel
            self._getting_kernel = None
            await self._stop(owner)
        return True

    async def _end_unused(self) -> None:
        """End the kernels that their sandboxes have got long ago, and not used."""
        oldest = self.clock() - UNUSED_SECONDS
        for sandbox in [each for each, since in self._unused.items() if since < oldest]:
            del self._unused[sandbox]
            if self.end_unused is not None:
                with log_errors(f"the unused kernel of {sandbox} could not be ended"):
                    await self.end_unused(sandbox)

    # Maintenance ---------------------------------------------------------------------------

    async def _maintain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CHECK_SECONDS):
                await self._changed.wait()
        await self._forget_old_shapes()
        await self._end_unused()
        has_room = await in_thread(self._has_room)
        # Last: what was claimed a moment ago must not be replaced at once.
        await self._wait_for_quiet()
        self._changed.clear()
        shares = self._shares() if has_room else {}
        if not has_room:
            await self._stop_starting()
        for shape, ready in list(self._ready.items()):
            while ready and self._number(shape) > shares.get(shape, 0):
                await self._stop(ready.pop())
        if await self._refill(shares):
            self._behind_since = None
            self._start_kernel(shape for shape in shares if shape in self._demand)

    async def _wait_for_quiet(self) -> None:
        while self._behind_since is not None:
            latest = max(map(self._latest, self._demand), default=0.0)
            until = min(latest + QUIET_SECONDS, self._behind_since + MAX_WAIT_SECONDS)
            if (seconds := until - self.clock()) <= 0:
                return
            await self.sleep(seconds)

    async def _refill(self, shares: Mapping[Shape, int]) -> bool:
        """Start what is missing, as far as there is room; False if demand changes meanwhile."""
        for shape, share in shares.items():
            while self._number(shape) < share:
                if not await self._add(shape):
                    return True
                if self._changed.is_set():
                    # Something else may be in demand by now.
                    return False
        return True

    def _number(self, shape: Shape) -> int:
        """How many wait, or are going to in a moment."""
        getting = self._getting_kernel is not None and self._getting_kernel[0] == shape
        return len(self._ready.setdefault(shape, deque())) + getting

    async def _forget_old_shapes(self) -> None:
        oldest = self.clock() - KEEP_SECONDS
        for shape in list(self._demand):
            if self._latest(shape) < oldest or not await in_thread(shape.is_current):
                del self._demand[shape]
        for shape in [shape for shape in self._ready if shape not in self._demand]:
            for owner in self._ready.pop(shape):
                await self._stop(owner)

    def _shares(self) -> dict[Shape, int]:
        """How many of each shape there should be; those requested last come first."""
        now, latest_first = self.clock(), sorted(self._demand, key=self._latest, reverse=True)
        shares = dict.fromkeys(latest_first[: self.maximum], 1)
        left = self.maximum - len(shares)
        for shape in shares:
            more = min(self._demand[shape].count(now) - 1, left)
            shares[shape] += more
            left -= more
        return shares

    def _latest(self, shape: Shape) -> float:
        demand = self._demand.get(shape)
        return demand.latest if demand is not None else 0.0

    def _has_room(self) -> bool:
        try:
            self.containers.disks.require_space()
        except (HostError, OSError):
            return False
        return available_memory_share() >= _MIN_MEMORY_SHARE

    async def _add(self, shape: Shape) -> bool:
        """Start one; False if there is no room for it."""
        owner = f"{PREFIX}{secrets.token_hex(8)}"
        spec = ContainerSpec(
            owner,
            shape.tree,
            shape.policy,
            shape.limits,
            self.paths.warm / owner,
            partial(write_identity, shape.tree),
            spare=True,
        )
        try:
            await self.containers.start(spec)
            await self.containers.pause(owner)
        except HostFull:
            await self._stop(owner)
            return False
        except (HostError, OSError):
            await self._stop(owner)
            if await in_thread(shape.is_current):
                raise
            return self._forget(shape)
        except BaseException:
            await self._stop(owner)
            raise
        # The image may have been deleted while it started.
        if shape not in self._demand or not await in_thread(shape.is_current):
            await self._stop(owner)
            return self._forget(shape)
        self._ready.setdefault(shape, deque()).append(owner)
        return True

    def _forget(self, shape: Shape) -> Literal[False]:
        """Start none of a shape any more; the others have their turn at once."""
        self._demand.pop(shape, None)
        self._changed.set()
        return False

    async def _stop(self, owner: str) -> None:
        self._kernels.pop(owner, None)
        with log_errors(f"the warm container {owner} could not be stopped"):
            await self.containers.stop(owner)
        # Whoever stops several goes on with the next.
        with log_errors(f"the directory of the warm container {owner} could not be removed"):
            await in_thread(self.trash.discard, self.paths.warm / owner)


def configured_maximum(environment: Mapping[str, str] = os.environ) -> int:
    """The number of warm containers that may exist; by default one for 2 GiB of memory, up to 8.

    Raises InvalidRequest for a setting that is not a number of them.
    """
    setting = environment.get(SETTING, "")
    if not setting:
        total_gib = memory_bytes("MemTotal") / 1024**3
        return min(max(round(total_gib / _GIB_PER_CONTAINER), 1), _MAX_DEFAULT)
    if not setting.isdecimal() or len(setting) > len(str(MAXIMUM)) or int(setting) > MAXIMUM:
        raise InvalidRequest(
            f"{SETTING} must be a whole number from 0 to {MAXIMUM}, not {setting[:20]!r}."
        )
    return int(setting)


def available_memory_share() -> float:
    """The share of the machine's memory that is available (proc_meminfo(5))."""
    return memory_bytes("MemAvailable") / memory_bytes("MemTotal")
