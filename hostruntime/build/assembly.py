"""Making one image: boot on a base, run the recipe's steps, capture, scrub, publish.

Templates and the built-in bases are made by the same code, a pipeline of values, each made by one
function from the one before::

    Staged      the steps have run, and their container has ended
    Captured    the new tree is whole, scrubbed and counted
    Described   its digest, packages and environment are known
    Published   the image is there

Whatever happens, when :meth:`Assembly.run` returns or raises nothing is left of the build but what
was published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hostruntime.build.inherited import Inherited
from hostruntime.build.kept_layers import BuildLayers
from hostruntime.build.layers import Layer, RanStep
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import not_kept, ran_past_build_time
from hostruntime.build.steps import StepRunner
from hostruntime.build.uncaptured import Uncaptured
from hostruntime.container.manager import ContainerSpec, RunningContainer
from hostruntime.container.merging import LostWrites, strip_host_parts
from hostruntime.errors import HostError, HostFull
from hostruntime.host.paths import write_json
from hostruntime.host.progress import Progress, reporting
from hostruntime.host.tasks import Stop, in_thread, run_to_completion
from hostruntime.image.capture import capture
from hostruntime.image.contents import installed_packages
from hostruntime.image.digest import image_digest
from hostruntime.image.environment import (
    ETC_ENVIRONMENT,
    MAX_FILE_BYTES,
    Environment,
    decoded,
    file_of,
)
from hostruntime.image.identity import give_identity
from hostruntime.image.known_contents import KnownContents
from hostruntime.image.scrub import RULES, remove_residue, scrub
from hostruntime.image.store import CONTENTS, Image, ImageManifest
from hostruntime.image.trees import Inventory, Measure, inventory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Staged:
    """The steps have run and nothing runs any more; what they wrote is in the container's layer.

    ``last_step`` is the last one that was run, 0 if none was: what /etc/environment holds is its
    work.
    """

    base: Image
    inherited: Inherited
    last_step: int


@dataclass(frozen=True)
class Captured:
    """The new tree; ``known`` has of the small files that were copied what they hold."""

    staged: Staged
    tree: Path
    measured: Measure
    known: KnownContents


@dataclass(frozen=True)
class Described:
    """What is in the new tree, whose ``flushing`` to the disk has begun."""

    base: Image
    directory: Path
    measured: Measure
    digest: str
    environment: Environment
    flushing: asyncio.Future[None]


@dataclass(frozen=True)
class Published:
    """The image, and how many milliseconds it took to publish it."""

    image: Image
    publish_ms: int


class Assembly:
    """One image being made."""

    def __init__(self, host: Host, plan: Plan, emit: Emit) -> None:
        self._host = host
        self._plan = plan
        self._emit = emit
        self._stop = Stop()
        self._began = time.monotonic()

    async def run(self) -> Published:
        """Make and publish the image.

        Raises BuildFailed, whose ``reason`` is the build's failure code; ImageNotFound without
        the base; ImageRevokedError when it may not be published any more; other HostErrors and
        OSError.  Cancelling it is safe at any point and is not answered before everything is
        gone that was not published.
        """
        plan, store = self._plan, self._host.store
        try:
            base = await in_thread(store.acquire, plan.base, plan.image_id)
            layers = self._layers_over(base)
            try:
                described = await self._within_build_time(self._make(base, layers))
            finally:
                await self._clean_up()
            published = await self._publish(described)
            if layers is not None:
                await layers.published()
            return published
        except BaseException:
            await in_thread(store.trash.discard, store.staging_path(plan.image_id))
            raise
        finally:
            await in_thread(store.release, plan.base, plan.image_id)

    async def _make(self, base: Image, layers: BuildLayers | None) -> Described:
        staged = await self._stage(base, layers)
        captured = await self._capture(staged)
        return await self._describe(captured)

    async def _within_build_time(self, work: Coroutine[Any, Any, Described]) -> Described:
        # A little longer than the steps get, so that a step that is out of time ends by TERM.
        try:
            async with asyncio.timeout(self._remaining() + 10.0) as limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise ran_past_build_time(self._plan.build_timeout) from None

    def _remaining(self) -> float:
        return max(0.0, self._began + self._plan.build_timeout - time.monotonic())

    def _layers_over(self, base: Image) -> BuildLayers | None:
        if self._plan.cache is None:
            return None
        return BuildLayers(self._host, self._plan, self._plan.cache, base, self._emit, self._stop)

    def _telling(self, phase: str, done: Progress) -> AbstractAsyncContextManager[None]:
        """Say every second how far a phase is that is not over sooner."""
        return reporting(
            lambda: self._emit("progress", phase=phase, files=done.files, bytes=done.bytes)
        )

    # Staged: boot and run the steps -------------------------------------------------------

    async def _stage(self, base: Image, layers: BuildLayers | None) -> Staged:
        inherited = await in_thread(self._inherit, base)
        cached = await self._boot(base, layers)
        uncaptured = Uncaptured(self._host.containers, self._plan.image_id)
        unkept = LostWrites()
        if cached:
            await self._take_up(base, cached, uncaptured, unkept)
        steps = StepRunner(
            self._host,
            self._plan,
            self._emit,
            self._remaining,
            partial(self._environment, inherited),
        )
        for number in range(len(cached) + 1, len(self._plan.recipe) + 1):
            refused = await steps.run(number)
            lost = await self._unkept_of_step(base, unkept)
            self._tell_unkept(number, lost)
            left = await uncaptured.look(number)
            if layers is not None:
                await layers.after_step(number, refused, left, lost)
        uncaptured.tell(self._emit)
        await self._host.containers.halt(self._plan.image_id)
        return Staged(base, inherited, steps.last)

    def _inherit(self, base: Image) -> Inherited:
        """What the build begins with.  Raises BuildFailed if no process can have it."""
        plan = self._plan
        file = file_of(base.tree)
        lent = file_of(self._host.runtime_tree(plan.policy, base.tree))
        host = self._host.containers.environment(plan.policy.mode)
        inherited = Inherited(host, base.manifest.env, f"{file}\n{lent}", plan.env)
        inherited.of_process(file, 0)
        return inherited

    async def _environment(self, inherited: Inherited, last_step: int) -> Mapping[str, str]:
        """What the step that begins now has: what is baked so far, over what the host gives."""
        try:
            data = await self._host.containers.read_head(
                self._plan.image_id, ETC_ENVIRONMENT, MAX_FILE_BYTES + 1
            )
        except HostError:
            # There is none, or no process can be started: the step itself will say so.
            data = b""
        return inherited.of_process(decoded(data), last_step)

    async def _boot(self, base: Image, layers: BuildLayers | None) -> Sequence[RanStep]:
        """Start the container; return the steps that it begins behind."""
        began = time.monotonic()
        layer = running = None
        if layers is not None and (layer := await in_thread(layers.find)) is not None:
            running = await self._start_from_layer(base, layers, layer)
        if running is None:
            layer, running = None, await self._start(base)
        self._emit("boot", boot_ms=round(running.boot_ms, 1), duration_ms=_since(began))
        return layers.begun(layer) if layers is not None else ()

    async def _start_from_layer(
        self, base: Image, layers: BuildLayers, layer: Layer
    ) -> RunningContainer | None:
        """Start where the layer was; None, and nothing started, if that cannot be done."""
        try:
            running = await self._start(base, layer.disk)
            await layers.put_back(layer)
        except HostFull:
            raise
        except (HostError, OSError) as error:
            _log.warning("the layer %s is of no use: %s", layer.directory, error)
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
        give_identity(base.tree, upper, machine_id=False)
        if self._plan.provide is not None:
            self._plan.provide(upper)

    async def _take_up(
        self, base: Image, cached: Sequence[RanStep], uncaptured: Uncaptured, unkept: LostWrites
    ) -> None:
        """Say of each step that is not run again what it did in vain."""
        uncaptured.take_up([step.left for step in cached])
        # What nobody is known to have left is as old as the last of them.
        await uncaptured.look(len(cached))
        unclaimed = set(await self._unkept_of_step(base, unkept))
        for number, step in enumerate(cached, 1):
            self._tell_unkept(number, step.unkept)
            unclaimed -= set(step.unkept)
        self._tell_unkept(len(cached), sorted(unclaimed))

    async def _unkept_of_step(self, base: Image, unkept: LostWrites) -> list[str]:
        """What was written since this was last asked that every container gets from its host."""
        lent = await in_thread(self._host.runtime_tree, self._plan.policy, base.tree)
        upper = self._host.containers.layer(self._plan.image_id)
        return await in_thread(unkept.after_step, upper, lent)

    def _tell_unkept(self, step: int, paths: Sequence[str]) -> None:
        if paths:
            message = not_kept(paths)
            self._emit("not_captured", step=step, paths=paths, count=len(paths), message=message)

    # Captured: make the new tree, scrub it, count it --------------------------------------

    async def _capture(self, staged: Staged) -> Captured:
        began, done = time.monotonic(), Progress()
        directory = await in_thread(self._host.store.staging, self._plan.image_id)
        tree = directory / "tree"
        async with self._telling("capture", done):
            known = await self._stop.in_thread(self._link, staged.base, tree, done)
        linked = time.monotonic()
        async with self._telling("scrub", done):
            await self._scrub(tree)
        scrubbed = time.monotonic()
        async with self._telling("capture", done):
            found = await self._stop.in_thread(self._take_stock, staged.base, directory)
        measured = found.measure()
        self._emit(
            "capture",
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            duration_ms=_since(began + scrubbed - linked),
        )
        return Captured(staged, tree, measured, known)

    def _link(self, base: Image, tree: Path, done: Progress) -> KnownContents:
        layer = self._host.containers.layer(self._plan.image_id)
        captured = capture(base.tree, layer, tree, self._stop.check, done)
        lent = self._host.runtime_tree(self._plan.policy, base.tree)
        remove_residue(tree, base.tree, lent)
        strip_host_parts(tree, base.tree, lent)
        return captured.known

    def _take_stock(self, base: Image, directory: Path) -> Inventory:
        found = inventory(directory / "tree", self._stop.check)
        self._host.store.keep_holdings(directory, base, found)
        return found

    async def _scrub(self, tree: Path) -> None:
        began = time.monotonic()
        removed = await self._stop.in_thread(scrub, tree, RULES, self._stop.check)
        self._emit(
            "scrub",
            removed_bytes=sum(gone.size_bytes for gone in removed.values()),
            removed=[
                {"what": what, "bytes": gone.size_bytes, "files": gone.files}
                for what, gone in removed.items()
            ],
            duration_ms=_since(began),
        )

    # Described: say what is in it ---------------------------------------------------------

    async def _describe(self, captured: Captured) -> Described:
        """Say what is in the finished tree, while the disk is already at writing it."""
        # Not waited for when cancelled: it may take as long as the disk does, and changes nothing.
        flushing = asyncio.ensure_future(asyncio.to_thread(self._host.store.flush))
        flushing.add_done_callback(_retrieve)
        began, done = time.monotonic(), Progress()
        async with self._telling("contents", done):
            contents = await self._stop.in_thread(self._read_contents, captured, done)
        self._emit("contents", **contents, duration_ms=_since(began))
        return Described(
            base=captured.staged.base,
            directory=captured.tree.parent,
            measured=captured.measured,
            digest=str(contents["digest"]),
            environment=contents["env"],
            flushing=flushing,
        )

    def _read_contents(self, captured: Captured, done: Progress) -> dict[str, Any]:
        staged, tree, check = captured.staged, captured.tree, self._stop.check
        below = self._host.store.digest(staged.base, check)
        digest = image_digest(
            tree, staged.base.tree, below, check, known=captured.known, progress=done
        )
        file = file_of(tree)
        staged.inherited.of_process(file, staged.last_step)
        found = installed_packages(tree, check).to_json()
        contents = {"digest": digest, **found, "env": staged.inherited.baked(file)}
        write_json(tree.parent / CONTENTS, contents)
        return contents

    # Published: let everybody see it ------------------------------------------------------

    async def _publish(self, described: Described) -> Published:
        plan, store, began = self._plan, self._host.store, time.monotonic()
        measured = described.measured
        manifest = ImageManifest(
            id=plan.image_id,
            kind=plan.kind,
            base=described.base.id,
            created_at=time.time(),
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            definition=plan.definition,
            digest=described.digest,
            env=dict(described.environment),
            details=dict(plan.details),
        )
        async with self._telling("publish", Progress(measured.file_count, measured.size_bytes)):
            await asyncio.shield(described.flushing)
        publish = partial(store.publish, flushed=True)
        image = await in_thread(publish, described.directory, manifest)
        return Published(image, _since(began))

    async def _clean_up(self) -> None:
        """Stop the container and give its disk back.

        What cannot be undone now is logged, and undone when the agent next starts; it must not
        hide why the build ended.
        """
        try:
            await run_to_completion(self._host.containers.stop(self._plan.image_id))
        except (HostError, OSError):
            _log.exception("build %s could not be cleaned up", self._plan.image_id)


def _retrieve(flushing: asyncio.Future[None]) -> None:
    """Whoever waits for it gets its failure; if nobody does any more it is no matter."""
    if not flushing.cancelled():
        flushing.exception()


def _since(began: float) -> int:
    """How many milliseconds ago that was, on the monotonic clock."""
    return round((time.monotonic() - began) * 1000)
