"""Making one image: boot on a base, run the recipe's steps, capture, scrub, publish.

Templates and the built-in bases are made by the same code.  :meth:`Assembly.run` reads as the
table of contents.  Whatever happens, when it returns or raises nothing is left of the build but
what was published.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

from hostruntime.build.kept_layers import BuildLayers
from hostruntime.build.layers import Layer, RanStep
from hostruntime.build.plan import Emit, Host, Plan
from hostruntime.build.report import environment_too_large, not_kept, ran_past_build_time
from hostruntime.build.steps import StepRunner
from hostruntime.build.uncaptured import Uncaptured
from hostruntime.container.joining import Unkept, take_back
from hostruntime.container.manager import ContainerSpec, Running
from hostruntime.errors import HostError, HostFull, InvalidRequest
from hostruntime.host.paths import write_json
from hostruntime.host.progress import Progress, telling
from hostruntime.host.tasks import Stop, in_thread, to_the_end
from hostruntime.image.capture import Captured, capture
from hostruntime.image.contents import installed_packages
from hostruntime.image.digest import image_digest
from hostruntime.image.environment import (
    ETC_ENVIRONMENT,
    MAX_FILE_BYTES,
    Environment,
    baked,
    check_environment,
    check_variables,
    decoded,
    file_of,
    resolved,
    written,
)
from hostruntime.image.identity import give_identity
from hostruntime.image.scrub import RULES, remove_residue, scrub
from hostruntime.image.store import CONTENTS, Image, ImageManifest
from hostruntime.image.trees import Inventory, Measure, inventory

_log = logging.getLogger(__name__)


class Assembly:
    """One image being made."""

    def __init__(self, host: Host, plan: Plan, emit: Emit) -> None:
        self._host = host
        self._plan = plan
        self._emit = emit
        self._steps = StepRunner(host, plan, emit, self._remaining, self._environment)
        self._unkept = Unkept()
        self._uncaptured = Uncaptured(host.containers, plan.image_id)
        self._stop = Stop()
        self._layers: BuildLayers | None = None
        self._began = time.monotonic()
        self._flushing: asyncio.Future[None]
        self._digest: str | None = None
        self._captured = Captured()
        self._base_env: Mapping[str, str] = {}
        self._base_file = self._lent_file = ""
        # The last step that was run, 0 before the first: what /etc/environment holds is its work.
        self._ran = 0
        self.publish_ms = 0

    async def run(self) -> Image:
        """Make and publish the image; then ``publish_ms`` says how long the latter took.

        Raises BuildFailed, whose ``reason`` is the build's failure code; ImageNotFound without
        the base; ImageRevokedError when it may not be published any more; other HostErrors and
        OSError.  Cancelling it is safe at any point and is not answered before everything is
        gone that was not published.
        """
        plan, store = self._plan, self._host.store
        base = store.acquire(plan.base, plan.image_id)
        try:
            try:
                measured = await self._within_build_time(self._stage(base))
            finally:
                await self._clean_up()
            image = await self._publish(base, measured)
            if self._layers is not None:
                await self._layers.published()
            return image
        except BaseException:
            await in_thread(store.trash.discard, self._staged)
            raise
        finally:
            store.release(plan.base, plan.image_id)

    @property
    def _staged(self) -> Path:
        return self._host.store.staging_path(self._plan.image_id)

    async def _within_build_time(self, work: Coroutine[Any, Any, Measure]) -> Measure:
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

    async def _environment(self) -> Mapping[str, str]:
        """What the step that begins now has: what is baked so far, over what the host gives."""
        try:
            data = await self._host.containers.text_of(
                self._plan.image_id, ETC_ENVIRONMENT, MAX_FILE_BYTES + 1
            )
        except HostError:
            # There is none, or no process can be started: the step itself will say so.
            data = b""
        return self._usable(decoded(data))

    def _usable(self, file: str) -> Environment:
        """The environment with this /etc/environment.  Raises BuildFailed if no process can."""
        own = self._baked(file)
        found = resolved(self._host_env, own)
        try:
            check_environment(own)
            check_variables(found)
        except InvalidRequest as error:
            raise environment_too_large(self._ran, error.detail) from error
        return found

    def _baked(self, file: str) -> Environment:
        """The image's environment with this /etc/environment: the base's, that, the template's."""
        before = f"{self._base_file}\n{self._lent_file}"
        own = written(file, before, self._host_env)
        return baked(baked(self._base_env, own), self._plan.env)

    @property
    def _host_env(self) -> Mapping[str, str]:
        return self._host.containers.environment(self._plan.policy.mode)

    # Phases -------------------------------------------------------------------------------

    async def _stage(self, base: Image) -> Measure:
        self._base_env = base.manifest.env
        self._base_file = await in_thread(file_of, base.tree)
        lent = await in_thread(self._host.runtime_tree, self._plan.policy, base.tree)
        self._lent_file = await in_thread(file_of, lent)
        self._usable(self._base_file)
        cached = await self._boot(base)
        if cached:
            await self._take_up(base, cached)
        for number in range(len(cached) + 1, len(self._plan.recipe) + 1):
            refused = await self._steps.run(number)
            self._ran = number
            unkept = await self._unkept_of_step(base)
            self._tell_unkept(number, unkept)
            left = await self._uncaptured.look(number)
            if self._layers is not None:
                await self._layers.after_step(number, refused, left, unkept)
        self._uncaptured.tell(self._emit)
        await self._host.containers.halt(self._plan.image_id)
        measured = await self._capture(base)
        await self._describe(base)
        return measured

    async def _take_up(self, base: Image, cached: Sequence[RanStep]) -> None:
        """Say of each step that is not run again what it did in vain."""
        self._uncaptured.take_up([step.left for step in cached])
        # What nobody is known to have left is as old as the last of them.
        await self._uncaptured.look(len(cached))
        unclaimed = set(await self._unkept_of_step(base))
        for number, step in enumerate(cached, 1):
            self._tell_unkept(number, step.unkept)
            unclaimed -= set(step.unkept)
        self._tell_unkept(len(cached), sorted(unclaimed))

    async def _unkept_of_step(self, base: Image) -> list[str]:
        """What was written since this was last asked that every container gets from its host."""
        lent = await in_thread(self._host.runtime_tree, self._plan.policy, base.tree)
        upper = self._host.containers.layer(self._plan.image_id)
        return await in_thread(self._unkept.after_step, upper, lent)

    def _tell_unkept(self, step: int, paths: Sequence[str]) -> None:
        if paths:
            message = not_kept(paths)
            self._emit("not_captured", step=step, paths=paths, count=len(paths), message=message)

    async def _boot(self, base: Image) -> Sequence[RanStep]:
        """Start the container; return the steps that it begins behind."""
        plan, began, layer = self._plan, time.monotonic(), None
        if plan.cache is not None:
            self._layers = BuildLayers(self._host, plan, plan.cache, base, self._emit, self._stop)
            layer = await in_thread(self._layers.find)
        running = await self._start_from_layer(base, layer) if layer is not None else None
        if running is None:
            layer, running = None, await self._start(base)
        self._emit("boot", boot_ms=round(running.boot_ms, 1), duration_ms=_since(began))
        return self._layers.begun(layer) if self._layers is not None else ()

    async def _start_from_layer(self, base: Image, layer: Layer) -> Running | None:
        """Start where the layer was; None, and nothing started, if that cannot be done."""
        assert self._layers is not None
        try:
            running = await self._start(base, layer.disk)
            await self._layers.put_back(layer)
        except HostFull:
            raise
        except (HostError, OSError) as error:
            _log.warning("the layer %s is of no use: %s", layer.directory, error)
            await to_the_end(self._host.containers.stop(self._plan.image_id))
            await in_thread(self._layers.drop, layer)
            return None
        return running

    async def _start(self, base: Image, saved_disk: Path | None = None) -> Running:
        plan = self._plan
        return await self._host.containers.start(
            ContainerSpec(
                owner=plan.image_id,
                image_tree=base.tree,
                policy=plan.policy,
                limits=plan.limits,
                directory=plan.directory,
                provide=None if saved_disk else partial(self._provide, base),
                saved_disk=saved_disk,
            )
        )

    def _provide(self, base: Image, upper: Path) -> None:
        give_identity(base.tree, upper, machine_id=False)
        if self._plan.provide is not None:
            self._plan.provide(upper)

    async def _capture(self, base: Image) -> Measure:
        plan, began, done = self._plan, time.monotonic(), Progress()
        staged = await in_thread(self._host.store.staging, plan.image_id)
        tree = staged / "tree"
        async with self._telling("capture", done):
            self._captured = await self._stop.in_thread(self._link, base, tree, done)
        linked = time.monotonic()
        async with self._telling("scrub", done):
            await self._scrub(tree)
        scrubbed = time.monotonic()
        async with self._telling("capture", done):
            found = await self._stop.in_thread(self._take_stock, base)
        measured = found.measure()
        self._emit(
            "capture",
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            duration_ms=_since(began + scrubbed - linked),
        )
        return measured

    def _telling(self, phase: str, done: Progress) -> AbstractAsyncContextManager[None]:
        """Say every second how far a phase is that is not over sooner."""
        return telling(
            lambda: self._emit("progress", phase=phase, files=done.files, bytes=done.bytes)
        )

    def _link(self, base: Image, tree: Path, done: Progress) -> Captured:
        layer = self._host.containers.layer(self._plan.image_id)
        captured = capture(base.tree, layer, tree, self._stop.check, done)
        lent = self._host.runtime_tree(self._plan.policy, base.tree)
        remove_residue(tree, base.tree, lent)
        take_back(tree, base.tree, lent)
        return captured

    def _take_stock(self, base: Image) -> Inventory:
        found = inventory(self._staged / "tree", self._stop.check)
        self._host.store.keep_holdings(self._staged, base, found)
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

    async def _describe(self, base: Image) -> None:
        """Say what is in the finished tree, while the disk is already at writing it."""
        # Not waited for when cancelled: it may take as long as the disk does, and changes nothing.
        self._flushing = asyncio.ensure_future(asyncio.to_thread(self._host.store.flush))
        self._flushing.add_done_callback(_retrieve)
        began, done = time.monotonic(), Progress()
        async with self._telling("contents", done):
            contents = await self._stop.in_thread(self._read_contents, base, done)
        self._digest = str(contents["digest"])
        self._emit("contents", **contents, duration_ms=_since(began))

    def _read_contents(self, base: Image, done: Progress) -> dict[str, Any]:
        tree, check = self._staged / "tree", self._stop.check
        below = self._host.store.digest(base, check)
        known, self._captured = self._captured.known, Captured()
        digest = image_digest(tree, base.tree, below, check, known=known, progress=done)
        file = file_of(tree)
        self._usable(file)
        found = installed_packages(tree, check).to_json()
        contents = {"digest": digest, **found, "env": self._baked(file)}
        write_json(self._staged / CONTENTS, contents)
        return contents

    async def _publish(self, base: Image, measured: Measure) -> Image:
        plan, store, began = self._plan, self._host.store, time.monotonic()
        manifest = ImageManifest(
            id=plan.image_id,
            kind=plan.kind,
            base=base.id,
            created_at=time.time(),
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            definition=plan.definition,
            digest=self._digest,
            env=self._baked(await in_thread(file_of, self._staged / "tree")),
            details=dict(plan.details),
        )
        async with self._telling("publish", Progress(measured.file_count, measured.size_bytes)):
            await asyncio.shield(self._flushing)
        image = await in_thread(partial(store.publish, flushed=True), self._staged, manifest)
        self.publish_ms = _since(began)
        return image

    async def _clean_up(self) -> None:
        """Stop the container and give its disk back.

        What cannot be undone now is logged, and undone when the agent next starts; it must not
        hide why the build ended.
        """
        try:
            await to_the_end(self._host.containers.stop(self._plan.image_id))
        except (HostError, OSError):
            _log.exception("build %s could not be cleaned up", self._plan.image_id)


def _retrieve(flushing: asyncio.Future[None]) -> None:
    """Whoever waits for it gets its failure; if nobody does any more it is no matter."""
    if not flushing.cancelled():
        flushing.exception()


def _since(began: float) -> int:
    """How many milliseconds ago that was, on the monotonic clock."""
    return round((time.monotonic() - began) * 1000)
