"""The layers of one build: which layer it starts from, and which of its own steps it saves.

With ``reuse`` a build starts from the deepest layer of its scope that matches its recipe, and
reports each step that it skips. Without, every step is run. Either way it saves the result of a
step if that is cheap compared to running it, in case a later step fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from functools import cached_property

from hostruntime.build.layers import DISK_FILE, TMPFS_FILE, CompletedStep, Layer, layer_keys
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import RefusedHost
from hostruntime.container.disk import DiskStuckError
from hostruntime.container.exec import shell_argv
from hostruntime.container.tmpfs import restore_tmpfs, save_tmpfs
from hostruntime.errors import HostError, HostFault
from hostruntime.host.tasks import Stop, in_thread
from hostruntime.image.environment import merge_baked
from hostruntime.image.store import Image
from hostruntime.wire.builds import Cache

# The assumed speed of a copy, and how much of a build's time copies may take.
COPY_BYTES_PER_SECOND = 200_000_000
MIN_COPY_SECONDS = 0.3
MAX_COPY_SHARE = 0.15
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
        self._steps: list[CompletedStep] = []
        self._saved_keys: list[str] = []
        self._last_saved = time.monotonic()

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
                **merge_baked(manifest.env, plan.env),
            },
            network={
                "mode": plan.policy.mode,
                "allow_domains": None if domains is None else sorted(domains),
            },
            disk_mb=plan.limits.disk_size_mb,
        )

    # Starting from a layer ----------------------------------------------------------------

    def find(self) -> Layer | None:
        """Return the layer to start from, if reuse was requested and there is one."""
        if not self._cache.reuse:
            return None
        return self._host.layers.deepest(self._cache.scope, self._keys)

    async def restore(self, layer: Layer) -> None:
        """Restore the tmpfs of the container that was started on the layer's disk.

        Raises HostError, OSError.
        """
        if layer.tmpfs is not None:
            await restore_tmpfs(
                self._host.containers, self._plan.image_id, layer.tmpfs, timeout=_TAR_SECONDS
            )
        if not await in_thread(layer.still_exists):
            raise HostFault("Another build replaced or deleted it in the meantime.")

    def drop(self, layer: Layer) -> None:
        """Delete a layer that turned out to be unusable."""
        self._host.layers.discard(layer.directory)

    def start(self, layer: Layer | None) -> Sequence[CompletedStep]:
        """Report the steps that are not run again, once the container runs; return them."""
        self._steps = list(layer.steps) if layer is not None else []
        for number, step in enumerate(self._steps, 1):
            self._emit(
                "step_cached",
                step=number,
                total=len(self._plan.recipe),
                command=self._plan.recipe[number - 1],
                saved_at=step.at,
                build=step.build,
                refused=[item.to_wire() for item in step.refused],
            )
        self._last_saved = time.monotonic()
        return tuple(self._steps)

    # Saving the result of a step ----------------------------------------------------------

    async def save_after_step(
        self,
        number: int,
        refused: Sequence[RefusedHost],
        uncaptured: Sequence[str],
        lost_writes: Sequence[str],
    ) -> None:
        """Save a layer after a successful step, while nothing runs, if it is worth it.

        ``refused`` are the hosts that the network policy refused it; ``uncaptured`` and
        ``lost_writes`` are paths it wrote that do not end up in the image. Failing to save a layer
        does not fail the build. Raises DiskStuckError.
        """
        paths = (tuple(uncaptured), tuple(lost_writes))
        self._steps.append(CompletedStep(self._plan.image_id, time.time(), tuple(refused), *paths))
        if number == len(self._plan.recipe) or not await in_thread(self._is_worth_saving):
            return
        try:
            await self._save(number)
        except DiskStuckError:
            raise
        except (HostError, OSError) as error:
            build = self._plan.image_id
            _log.warning("no layer was saved for build %s, step %d: %s", build, number, error)
        self._last_saved = time.monotonic()

    def _is_worth_saving(self) -> bool:
        size = self._host.containers.disk_allocated(self._plan.image_id)
        spent = time.monotonic() - self._last_saved
        affordable = size / COPY_BYTES_PER_SECOND <= max(MIN_COPY_SECONDS, MAX_COPY_SHARE * spent)
        return affordable and self._host.layers.has_room(size)

    async def _save(self, number: int) -> None:
        layers, containers, owner = self._host.layers, self._host.containers, self._plan.image_id
        directory = await in_thread(layers.create_staging, owner)
        try:
            status = await save_tmpfs(
                containers,
                owner,
                directory / TMPFS_FILE,
                max_bytes=MAX_TMPFS_BYTES,
                timeout=_TAR_SECONDS,
            )
            if status != 0:
                return
            await containers.kill_all_but_init(owner)
            # Not awaited when cancelled: removing the disk ends it.
            await asyncio.to_thread(containers.flush_disk, owner)
            await self._stop.in_thread(
                containers.save_disk, owner, directory / DISK_FILE, self._stop.check
            )
            key = self._keys[number - 1]
            await in_thread(layers.add, directory, self._cache.scope, key, tuple(self._steps))
            self._saved_keys.append(key)
        finally:
            await in_thread(layers.discard, directory)

    # The end --------------------------------------------------------------------------------

    async def discard_saved(self) -> None:
        """Delete the layers saved for a retry, once the build has succeeded."""
        build, scope = self._plan.image_id, self._cache.scope
        try:
            await in_thread(self._host.layers.delete_written_by, build, scope, self._saved_keys)
        except (HostError, OSError) as error:
            _log.warning("the layers of build %s remain until collected: %s", build, error)
