"""Build one image: boot on a base, run the recipe's steps, capture, scrub, publish.

Templates and the built-in bases are built by the same pipeline of values, each computed by one
function from the previous one::

    Staged      the steps have run, and their container has stopped
    Captured    the new tree is complete, scrubbed and measured
    Described   its digest, packages and environment are known
    Published   the image is in the store

When :meth:`Assembly.run` returns or raises, nothing remains of the build except what was published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hostruntime.build.build_layers import BuildLayers
from hostruntime.build.environment import BuildEnvironment
from hostruntime.build.layers import CompletedStep, Layer
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import build_timed_out, lost_writes_message
from hostruntime.build.steps import StepRunner
from hostruntime.build.uncaptured import DIRECTORIES, UncapturedFiles
from hostruntime.container.manager import ContainerSpec, RunningContainer
from hostruntime.container.merging import LostWrites, strip_host_parts
from hostruntime.errors import HostError, HostFull
from hostruntime.host.paths import write_json
from hostruntime.host.progress import Progress, reporting
from hostruntime.host.tasks import Stop, in_thread, run_to_completion
from hostruntime.image.capture import capture
from hostruntime.image.content_hash import ContentHashCache
from hostruntime.image.contents import installed_packages
from hostruntime.image.digest import image_digest
from hostruntime.image.environment import (
    ETC_ENVIRONMENT,
    MAX_FILE_BYTES,
    Environment,
    decode_environment_file,
    read_environment_file,
)
from hostruntime.image.identity import write_identity
from hostruntime.image.scrub import RULES, remove_residue, scrub
from hostruntime.image.store import CONTENTS_FILE, Image, ImageManifest
from hostruntime.image.trees import Inventory, TreeSize, inventory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Staged:
    """The steps have run and no process is left; what they wrote is in the container's layer.

    ``last_step`` is the last step that was run, 0 if none: it is blamed for /etc/environment.
    """

    base: Image
    environment: BuildEnvironment
    last_step: int


@dataclass(frozen=True)
class Captured:
    """The new tree; ``hashes`` are the content hashes of the small files that were copied."""

    staged: Staged
    tree: Path
    size: TreeSize
    hashes: ContentHashCache


@dataclass(frozen=True)
class Described:
    """What the new tree contains; ``flushing`` it to the disk has started."""

    base: Image
    directory: Path
    size: TreeSize
    digest: str
    environment: Environment
    flushing: asyncio.Future[None]


@dataclass(frozen=True)
class Published:
    """The image, and how long publishing it took, in milliseconds."""

    image: Image
    publish_ms: int


class Assembly:
    """The build of one image."""

    def __init__(self, host: Host, plan: Plan, emit: Emit) -> None:
        self._host = host
        self._plan = plan
        self._emit = emit
        self._stop = Stop()
        self._started_at = time.monotonic()
        self._cleaning: asyncio.Task[None] | None = None
        # The container's /etc/environment, as far as steps have changed it.
        self._environment_file = ""

    async def run(self) -> Published:
        """Build and publish the image.

        Raises BuildFailed, whose ``reason`` is the build's failure code; ImageNotFound without
        the base; ImageRevokedError if it may no longer be published; other HostErrors and
        OSError. Cancelling is safe at any point; it completes once everything unpublished has
        been removed.
        """
        plan, store = self._plan, self._host.store
        try:
            base = await in_thread(store.acquire, plan.base, plan.image_id)
            layers = self._layers_over(base)
            try:
                described = await self._within_build_time(self._build(base, layers))
            finally:
                await self._clean_up()
            published = await self._publish(described)
            if layers is not None:
                await layers.discard_saved()
            return published
        except BaseException:
            await in_thread(store.trash.discard, store.staging_path(plan.image_id))
            raise
        finally:
            await in_thread(store.release, plan.base, plan.image_id)

    async def _build(self, base: Image, layers: BuildLayers | None) -> Described:
        staged = await self._stage(base, layers)
        captured = await self._capture(staged)
        return await self._describe(captured)

    async def _within_build_time(self, work: Coroutine[Any, Any, Described]) -> Described:
        # A little longer than the steps get, so a step that runs out of time is stopped by TERM.
        try:
            async with asyncio.timeout(self._remaining() + 10.0) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise build_timed_out(self._plan.build_timeout) from None

    def _remaining(self) -> float:
        return max(0.0, self._started_at + self._plan.build_timeout - time.monotonic())

    def _layers_over(self, base: Image) -> BuildLayers | None:
        if self._plan.cache is None:
            return None
        return BuildLayers(self._host, self._plan, self._plan.cache, base, self._emit, self._stop)

    def _reporting(self, phase: str, progress: Progress) -> AbstractAsyncContextManager[None]:
        """Emit the progress of a phase every second."""
        return reporting(
            lambda: self._emit("progress", phase=phase, files=progress.files, bytes=progress.bytes)
        )

    # Staged: boot and run the steps -------------------------------------------------------

    async def _stage(self, base: Image, layers: BuildLayers | None) -> Staged:
        environment = await in_thread(self._initial_environment, base)
        cached = await self._boot(base, layers)
        leftovers = UncapturedFiles()
        tracker = LostWrites()
        if cached:
            await self._report_cached(base, cached, leftovers, tracker)
        steps = StepRunner(
            self._host,
            self._plan,
            self._emit,
            self._remaining,
            lambda last_step: environment.process_environment(self._environment_file, last_step),
        )
        for number in range(len(cached) + 1, len(self._plan.recipe) + 1):
            refused = await steps.run(number)
            lost_writes = await self._lost_writes_of_step(base, tracker)
            self._report_lost_writes(number, lost_writes)
            uncaptured = leftovers.update(number, await self._survey())
            if layers is not None:
                await layers.save_after_step(number, refused, uncaptured, lost_writes)
        leftovers.report(self._emit)
        await self._host.containers.halt(self._plan.image_id)
        return Staged(base, environment, steps.last_step)

    def _initial_environment(self, base: Image) -> BuildEnvironment:
        """Return the build's initial environment; raises BuildFailed if it is too large."""
        plan = self._plan
        file = read_environment_file(base.tree)
        runtime = read_environment_file(self._host.runtime_tree(plan.policy, base.tree))
        host = self._host.containers.environment(plan.policy.mode, plan.limits.cpu)
        environment = BuildEnvironment(host, base.manifest.env, f"{file}\n{runtime}", plan.env)
        environment.process_environment(file, 0)
        return environment

    async def _survey(self) -> Sequence[Sequence[str] | None]:
        """Read /etc/environment for the next step; return what is in uncaptured directories."""
        try:
            found = await self._host.containers.survey(
                self._plan.image_id, ETC_ENVIRONMENT, MAX_FILE_BYTES + 1, DIRECTORIES
            )
            data = bytes.fromhex(found.head or "")
        except (HostError, ValueError):
            # Out of memory, perhaps: no reason to fail a build.  The next step says what is wrong.
            self._environment_file = ""
            return ()
        self._environment_file = decode_environment_file(data)
        return found.names

    async def _boot(self, base: Image, layers: BuildLayers | None) -> Sequence[CompletedStep]:
        """Start the container; return the steps that are reused from a layer."""
        started_at = time.monotonic()
        layer = running = None
        if layers is not None and (layer := await in_thread(layers.find)) is not None:
            running = await self._start_from_layer(base, layers, layer)
        if running is None:
            layer, running = None, await self._start(base)
        self._emit("boot", boot_ms=round(running.boot_ms, 1), duration_ms=_elapsed_ms(started_at))
        return layers.start(layer) if layers is not None else ()

    async def _start_from_layer(
        self, base: Image, layers: BuildLayers, layer: Layer
    ) -> RunningContainer | None:
        """Start from a layer; None, with nothing started, if the layer is unusable."""
        try:
            running = await self._start(base, layer.disk)
            await layers.restore(layer)
        except HostFull:
            raise
        except (HostError, OSError) as error:
            _log.warning("layer %s is unusable: %s", layer.directory, error)
            await run_to_completion(self._host.containers.stop(self._plan.image_id))
            await in_thread(layers.drop, layer)
            return None
        return running

    async def _start(self, base: Image, saved_disk: Path | None = None) -> RunningContainer:
        plan = self._plan
        return await self._host.containers.start(
            ContainerSpec(
                owner=plan.image_id,
                image_tree=base.tree,
                policy=plan.policy,
                limits=plan.limits,
                directory=plan.directory,
                populate=None if saved_disk else partial(self._provide, base),
                saved_disk=saved_disk,
            )
        )

    def _provide(self, base: Image, upper: Path) -> None:
        write_identity(base.tree, upper, machine_id=False)
        if self._plan.provide is not None:
            self._plan.provide(upper)

    async def _report_cached(
        self,
        base: Image,
        cached: Sequence[CompletedStep],
        leftovers: UncapturedFiles,
        tracker: LostWrites,
    ) -> None:
        """Report what each reused step wrote that is not in the image."""
        leftovers.resume([step.uncaptured for step in cached])
        # Files that no step is known to have left are attributed to the last one.
        leftovers.update(len(cached), await self._survey())
        unclaimed = set(await self._lost_writes_of_step(base, tracker))
        for number, step in enumerate(cached, 1):
            self._report_lost_writes(number, step.lost_writes)
            unclaimed -= set(step.lost_writes)
        self._report_lost_writes(len(cached), sorted(unclaimed))

    async def _lost_writes_of_step(self, base: Image, tracker: LostWrites) -> list[str]:
        """Return what was written since the last call but is replaced by the host's files."""
        runtime = await in_thread(self._host.runtime_tree, self._plan.policy, base.tree)
        upper = self._host.containers.layer(self._plan.image_id)
        return await in_thread(tracker.after_step, upper, runtime)

    def _report_lost_writes(self, step: int, paths: Sequence[str]) -> None:
        if paths:
            message = lost_writes_message(paths)
            self._emit("not_captured", step=step, paths=paths, count=len(paths), message=message)

    # Captured: create the new tree, scrub it, measure it ----------------------------------

    async def _capture(self, staged: Staged) -> Captured:
        started_at, progress = time.monotonic(), Progress()
        directory = await in_thread(self._host.store.create_staging, self._plan.image_id)
        tree = directory / "tree"
        async with self._reporting("capture", progress):
            hashes = await self._stop.in_thread(self._create_tree, staged.base, tree, progress)
        # Nothing needs the container any more; it goes while the tree is looked at.
        self._begin_to_clean_up()
        linked = time.monotonic()
        async with self._reporting("scrub", progress):
            await self._scrub(tree)
        scrubbed = time.monotonic()
        async with self._reporting("capture", progress):
            found = await self._stop.in_thread(self._measure, staged.base, directory)
        size = found.measure()
        self._emit(
            "capture",
            size_bytes=size.size_bytes,
            file_count=size.file_count,
            shared_bytes=size.shared_bytes,
            duration_ms=_elapsed_ms(started_at + scrubbed - linked),
        )
        return Captured(staged, tree, size, hashes)

    def _create_tree(self, base: Image, tree: Path, progress: Progress) -> ContentHashCache:
        layer = self._host.containers.layer(self._plan.image_id)
        captured = capture(base.tree, layer, tree, self._stop.check, progress)
        runtime = self._host.runtime_tree(self._plan.policy, base.tree)
        remove_residue(tree, base.tree, runtime)
        strip_host_parts(tree, base.tree, runtime)
        return captured.known

    def _measure(self, base: Image, directory: Path) -> Inventory:
        found = inventory(directory / "tree", self._stop.check)
        self._host.store.record_inodes(directory, base, found)
        return found

    async def _scrub(self, tree: Path) -> None:
        started_at = time.monotonic()
        removed = await self._stop.in_thread(scrub, tree, RULES, self._stop.check)
        self._emit(
            "scrub",
            removed_bytes=sum(freed.size_bytes for freed in removed.values()),
            removed=[
                {"what": what, "bytes": freed.size_bytes, "files": freed.files}
                for what, freed in removed.items()
            ],
            duration_ms=_elapsed_ms(started_at),
        )

    # Described: list the contents ---------------------------------------------------------

    async def _describe(self, captured: Captured) -> Described:
        """List the contents of the finished tree while it is being flushed to disk."""
        # Not awaited when cancelled: it may take long, and its result no longer matters.
        flushing = asyncio.ensure_future(asyncio.to_thread(self._host.store.flush))
        flushing.add_done_callback(_consume_exception)
        started_at, progress = time.monotonic(), Progress()
        async with self._reporting("contents", progress):
            contents = await self._stop.in_thread(self._read_contents, captured, progress)
        self._emit("contents", **contents, duration_ms=_elapsed_ms(started_at))
        return Described(
            base=captured.staged.base,
            directory=captured.tree.parent,
            size=captured.size,
            digest=str(contents["digest"]),
            environment=contents["env"],
            flushing=flushing,
        )

    def _read_contents(self, captured: Captured, progress: Progress) -> dict[str, Any]:
        staged, tree, check = captured.staged, captured.tree, self._stop.check
        below = self._host.store.digest(staged.base, check)
        digest = image_digest(
            tree, staged.base.tree, below, check, known=captured.hashes, progress=progress
        )
        file = read_environment_file(tree)
        staged.environment.process_environment(file, staged.last_step)
        found = installed_packages(tree, check).to_json()
        contents = {"digest": digest, **found, "env": staged.environment.image_environment(file)}
        write_json(tree.parent / CONTENTS_FILE, contents)
        return contents

    # Published: make it visible -----------------------------------------------------------

    async def _publish(self, described: Described) -> Published:
        plan, store, started_at = self._plan, self._host.store, time.monotonic()
        size = described.size
        manifest = ImageManifest(
            id=plan.image_id,
            kind=plan.kind,
            base=described.base.id,
            created_at=time.time(),
            size_bytes=size.size_bytes,
            file_count=size.file_count,
            shared_bytes=size.shared_bytes,
            definition=plan.definition,
            digest=described.digest,
            env=dict(described.environment),
            details=dict(plan.details),
        )
        async with self._reporting("publish", Progress(size.file_count, size.size_bytes)):
            await asyncio.shield(described.flushing)
        publish = partial(store.publish, flushed=True)
        image = await in_thread(publish, described.directory, manifest)
        return Published(image, _elapsed_ms(started_at))

    async def _clean_up(self) -> None:
        """Return when the container is stopped and its disk released."""
        await run_to_completion(self._begin_to_clean_up())

    def _begin_to_clean_up(self) -> asyncio.Task[None]:
        if self._cleaning is None:
            self._cleaning = asyncio.create_task(self._stop_container())
        return self._cleaning

    async def _stop_container(self) -> None:
        """Stop it and release its disk.

        A failure is only logged, so it does not hide why the build failed; the agent cleans up
        when it next starts.
        """
        try:
            await self._host.containers.stop(self._plan.image_id)
        except (HostError, OSError):
            _log.exception("build %s could not be cleaned up", self._plan.image_id)


def _consume_exception(flushing: asyncio.Future[None]) -> None:
    """Mark the exception as retrieved: if nothing awaits the flush any more, it doesn't matter."""
    if not flushing.cancelled():
        flushing.exception()


def _elapsed_ms(started_at: float) -> int:
    """Return the milliseconds since ``started_at``, on the monotonic clock."""
    return round((time.monotonic() - started_at) * 1000)
