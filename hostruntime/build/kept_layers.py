"""One build's layers: which one it may begin with, and which of its own steps it keeps.

With ``reuse`` it begins with the deepest layer of its scope that its recipe begins with, and says
so of each step that is not run.  Without, every step is run.  Either way it keeps what its steps
made, where that is cheap beside what they took, for the case that a later one fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import cached_property

from hostruntime.build.layers import DISK, TMPFS, Layer, RanStep, layer_keys
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import Refused
from hostruntime.container.disk import DiskStuckError
from hostruntime.container.exec import shell_argv
from hostruntime.container.tmpfs import restore_tmpfs, save_tmpfs
from hostruntime.errors import HostError, HostFault
from hostruntime.host.tasks import Stop, in_thread
from hostruntime.image.environment import baked
from hostruntime.image.store import Image
from hostruntime.wire.builds import Cache

# What a copy is reckoned to take, and how much of a build's time copies may.
COPY_BYTES_PER_SECOND = 200_000_000
ALWAYS_SECONDS = 0.3
SHARE_OF_TIME = 0.15
MAX_TMPFS_BYTES = 256 * 1024 * 1024
_TAR_SECONDS = 60.0
_log = logging.getLogger(__name__)


class BuildLayers:
    """The layers of one build that has ``cache``, over ``base``."""

    def __init__(
        self, host: Host, plan: Plan, cache: Cache, base: Image, emit: Emit, stop: Stop
    ) -> None:
        self._host = host
        self._plan = plan
        self._cache = cache
        self._base = base
        self._emit = emit
        self._stop = stop
        self._steps: list[RanStep] = []
        self._written: list[str] = []
        self._last = time.monotonic()

    @cached_property
    def _keys(self) -> list[str]:
        plan, manifest = self._plan, self._base.manifest
        domains = plan.policy.allow_domains
        return layer_keys(
            base={
                "image": self._base.tree.parent.name,
                "digest": manifest.digest or manifest.definition,
                "runtime": self._host.runtime_tree(plan.policy, self._base.tree).name,
            },
            commands=[shell_argv(command) for command in plan.recipe],
            environment={
                **self._host.containers.environment(plan.policy.mode),
                **baked(manifest.env, plan.env),
            },
            network={
                "mode": plan.policy.mode,
                "allow_domains": None if domains is None else sorted(domains),
            },
            disk_mb=plan.limits.disk_size_mb,
        )

    # Beginning with one -------------------------------------------------------------------

    def find(self) -> Layer | None:
        """The layer to begin with, if reuse was asked for and there is one."""
        if not self._cache.reuse:
            return None
        return self._host.layers.deepest(self._cache.scope, self._keys)

    async def put_back(self, layer: Layer) -> None:
        """Fill the tmpfs of the container that was started on the layer's disk.

        Raises HostError, OSError when that cannot be done.
        """
        if layer.tmpfs is not None:
            await restore_tmpfs(
                self._host.containers, self._plan.image_id, layer.tmpfs, timeout=_TAR_SECONDS
            )
        if not await in_thread(layer.is_there):
            raise HostFault("Another build has replaced or deleted it meanwhile.")

    def drop(self, layer: Layer) -> None:
        """It turned out to be of no use."""
        self._host.layers.discard(layer.directory)

    def begun(self, layer: Layer | None) -> Sequence[RanStep]:
        """The container runs: tell which steps are not run; return what is known of them."""
        self._steps = list(layer.steps) if layer is not None else []
        for number, step in enumerate(self._steps, 1):
            self._emit(
                "step_cached",
                step=number,
                total=len(self._plan.recipe),
                command=self._plan.recipe[number - 1],
                saved_at=step.at,
                build=step.build,
                refused=[one.to_wire() for one in step.refused],
            )
        self._last = time.monotonic()
        return tuple(self._steps)

    # Keeping what a step made -------------------------------------------------------------

    async def after_step(
        self, number: int, refused: Sequence[Refused], left: Sequence[str], unkept: Sequence[str]
    ) -> None:
        """The step has succeeded and nothing runs: keep what there is, if it is worth it.

        ``refused`` is what the network policy refused it all the same, ``left`` and ``unkept`` what
        it did in vain.  A layer that cannot be kept is no failure of the build.  Raises
        DiskStuckError.
        """
        vain = (tuple(left), tuple(unkept))
        self._steps.append(RanStep(self._plan.image_id, time.time(), tuple(refused), *vain))
        if number == len(self._plan.recipe) or not await in_thread(self._is_worth_it):
            return
        try:
            await self._keep(number)
        except DiskStuckError:
            raise
        except (HostError, OSError) as error:
            _log.warning("no layer of build %s, step %d: %s", self._plan.image_id, number, error)
        self._last = time.monotonic()

    def _is_worth_it(self) -> bool:
        size = self._host.containers.disk_allocated(self._plan.image_id)
        spent = time.monotonic() - self._last
        cheap = size / COPY_BYTES_PER_SECOND <= max(ALWAYS_SECONDS, SHARE_OF_TIME * spent)
        return cheap and self._host.layers.has_room(size)

    async def _keep(self, number: int) -> None:
        layers, containers, owner = self._host.layers, self._host.containers, self._plan.image_id
        directory = await in_thread(layers.begin, owner)
        try:
            status = await save_tmpfs(
                containers,
                owner,
                directory / TMPFS,
                max_bytes=MAX_TMPFS_BYTES,
                timeout=_TAR_SECONDS,
            )
            if status != 0:
                return
            await containers.kill_all_but_init(owner)
            # Not waited for when cancelled: taking the disk away ends it.
            await asyncio.to_thread(containers.flush_disk, owner)
            await self._stop.in_thread(
                containers.save_disk, owner, directory / DISK, self._stop.check
            )
            key = self._keys[number - 1]
            await in_thread(layers.add, directory, self._cache.scope, key, tuple(self._steps))
            self._written.append(key)
        finally:
            await in_thread(layers.discard, directory)

    # The end --------------------------------------------------------------------------------

    async def published(self) -> None:
        """What was kept for the case of a failure is not needed any more."""
        build, scope = self._plan.image_id, self._cache.scope
        try:
            await in_thread(self._host.layers.forget, build, scope, self._written)
        except (HostError, OSError) as error:
            _log.warning("the layers of build %s stay until they are collected: %s", build, error)
