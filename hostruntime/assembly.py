"""Making one image: boot on a base, run the recipe's steps, capture, scrub, publish.

Templates and the built-in bases are made by the same code.  :meth:`Assembly.run` reads as the
table of contents.  Whatever happens, when it returns or raises nothing is left of the build but
what was published.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hostruntime.build_output import StepOutput
from hostruntime.build_report import (
    Refused,
    container_stopped,
    out_of_disk,
    out_of_memory,
    ran_past_build_time,
    ran_past_step_time,
    step_failed,
)
from hostruntime.capture import Captured, capture
from hostruntime.egress import EgressProxy
from hostruntime.errors import BuildFailed, ContainerGone, ExecKilled, HostError
from hostruntime.exec import Chunk, Exited, Started, TimedOut, shell
from hostruntime.images import Image, ImageManifest, ImageStore
from hostruntime.limits import Limits
from hostruntime.manager import ContainerManager, ContainerSpec
from hostruntime.policy import Policy
from hostruntime.scrub import remove_residue, scrub
from hostruntime.trees import Measure, measure

STEP_DIRECTORY = "/root"
_log = logging.getLogger(__name__)


class Emit(Protocol):
    """Takes each event: its kind and its fields, as the contract names them."""

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Record one event."""


@dataclass(frozen=True)
class Host:
    """What an assembly needs of the host.

    ``runtime_tree`` takes a network mode.  ``refusals`` takes an owner and a Unix time and says
    which hosts the network policy has refused it since.
    """

    store: ImageStore
    containers: ContainerManager
    runtime_tree: Callable[[str], Path]
    refusals: Callable[[str, float], list[Refused]]


@dataclass(frozen=True)
class Plan:
    """What to make.  Timeouts are in seconds; ``directory`` is the container's, made by the caller.

    ``provide`` is called with the writable layer's directory before the container starts, in a
    thread, to put files in.  ``details`` and ``definition`` go into the manifest.
    """

    image_id: str
    kind: Literal["base", "template"]
    base: str
    recipe: tuple[str, ...]
    policy: Policy
    limits: Limits
    step_timeout: float
    build_timeout: float
    directory: Path
    provide: Callable[[Path], None] | None = None
    definition: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Assembly:
    """One image being made."""

    def __init__(self, host: Host, plan: Plan, emit: Emit) -> None:
        self._host = host
        self._plan = plan
        self._emit = emit
        self._stop = threading.Event()
        self._began = time.monotonic()

    async def run(self) -> Image:
        """Make and publish the image.

        Raises BuildFailed, whose ``reason`` is the build's failure code; ImageNotFound without
        the base; other HostErrors and OSError.  Cancelling it is safe at any point and is not
        answered before everything is gone, a just published image included.
        """
        plan, store = self._plan, self._host.store
        base = store.acquire(plan.base, plan.image_id)
        try:
            try:
                measured = await self._within_build_time(self._stage(base))
            finally:
                await self._clean_up()
            return await self._publish(base, measured)
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

    # Phases -------------------------------------------------------------------------------

    async def _stage(self, base: Image) -> Measure:
        await self._boot(base)
        for number in range(1, len(self._plan.recipe) + 1):
            await self._run_step(number)
        await self._host.containers.halt(self._plan.image_id)
        return await self._capture(base)

    async def _boot(self, base: Image) -> None:
        plan = self._plan
        running = await self._host.containers.start(
            ContainerSpec(
                owner=plan.image_id,
                image_tree=base.tree,
                policy=plan.policy,
                limits=plan.limits,
                directory=plan.directory,
                provide=plan.provide,
            )
        )
        self._emit("boot", boot_ms=round(running.boot_ms, 1))

    async def _run_step(self, number: int) -> None:
        command, total = self._plan.recipe[number - 1], len(self._plan.recipe)
        self._emit("step_started", step=number, total=total, command=command)
        began, remaining = time.time(), self._remaining()
        output = StepOutput(lambda text: self._emit("output", step=number, text=text))
        try:
            end = await self._execute(command, output, min(self._plan.step_timeout, remaining))
            await self._host.containers.kill_strays(self._plan.image_id)
        except (ContainerGone, ExecKilled):
            raise container_stopped(number, total, command, output.tail()) from None
        finally:
            output.finish()
        self._emit(
            "step_finished",
            step=number,
            exit_code=end.code if isinstance(end, Exited) else None,
            signal=end.signal if isinstance(end, Exited) else None,
            duration_ms=end.duration_ms,
            output_bytes=output.output_bytes,
            elided_bytes=output.elided_bytes,
        )
        if isinstance(end, TimedOut):
            raise self._out_of_time(number, output.tail(), began, remaining)
        if end.code != 0:
            raise self._failed(number, output.tail(), end, began)

    async def _execute(self, command: str, output: StepOutput, limit: float) -> Exited | TimedOut:
        frames = self._host.containers.exec(
            self._plan.image_id,
            shell(command),
            cwd=STEP_DIRECTORY,
            env={},
            timeout=limit,
            merge_output=True,
        )
        async with aclosing(frames) as stream:
            async for frame in stream:
                if isinstance(frame, Chunk):
                    output.feed(frame.data)
                elif not isinstance(frame, Started):
                    return frame
        raise ContainerGone("The step's command went away without a word.")

    def _out_of_time(self, number: int, tail: str, began: float, remaining: float) -> BuildFailed:
        plan = self._plan
        command, total = plan.recipe[number - 1], len(plan.recipe)
        if plan.step_timeout <= remaining:
            refused = self._host.refusals(plan.image_id, began)
            return ran_past_step_time(number, total, command, tail, plan.step_timeout, refused)
        return ran_past_build_time(plan.build_timeout, number, total, command, tail)

    def _failed(self, number: int, tail: str, end: Exited, began: float) -> BuildFailed:
        plan = self._plan
        command, total = plan.recipe[number - 1], len(plan.recipe)
        if end.out_of_memory:
            return out_of_memory(number, total, command, tail, plan.limits.memory_mb)
        if self._host.containers.disk_is_full(plan.image_id):
            return out_of_disk(number, total, command, tail, plan.limits.disk_size_mb)
        refused = self._host.refusals(plan.image_id, began)
        return step_failed(number, total, command, tail, end, refused)

    async def _capture(self, base: Image) -> Measure:
        plan, began = self._plan, time.monotonic()
        staged = await in_thread(self._host.store.staging, plan.image_id)
        tree = staged / "tree"
        captured = await in_thread(self._link, base, tree, on_cancel=self._stop.set)
        linked = time.monotonic()
        removed = await in_thread(scrub, tree)
        scrubbed = time.monotonic()
        self._emit("scrub", removed_bytes=removed, duration_ms=_ms(scrubbed - linked))
        measured = await in_thread(measure, tree, captured.linked)
        duration = time.monotonic() - scrubbed + linked - began
        self._emit(
            "capture",
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            duration_ms=_ms(duration),
        )
        return measured

    def _link(self, base: Image, tree: Path) -> Captured:
        layer = self._host.containers.layer(self._plan.image_id)
        captured = capture(base.tree, layer, tree, self._stop)
        remove_residue(tree, base.tree, self._host.runtime_tree(self._plan.policy.mode))
        return captured

    async def _publish(self, base: Image, measured: Measure) -> Image:
        plan, store = self._plan, self._host.store
        manifest = ImageManifest(
            id=plan.image_id,
            kind=plan.kind,
            base=base.id,
            created_at=time.time(),
            size_bytes=measured.size_bytes,
            file_count=measured.file_count,
            shared_bytes=measured.shared_bytes,
            definition=plan.definition,
            details=plan.details,
        )
        try:
            return await in_thread(store.publish, self._staged, manifest)
        except asyncio.CancelledError:
            # It may have been published before the cancellation was seen.
            await in_thread(store.delete, plan.image_id)
            raise

    async def _clean_up(self) -> None:
        """Stop the container and give its disk back.

        What cannot be undone now is logged, and undone when the agent next starts; it must not
        hide why the build ended.
        """
        try:
            await self._host.containers.stop(self._plan.image_id)
        except (HostError, OSError):
            _log.exception("build %s could not be cleaned up", self._plan.image_id)


def refused_hosts(proxy: EgressProxy, owner: str, since: float) -> list[Refused]:
    """What an owner's container was refused since a Unix time, each once."""
    refused = (d for d in proxy.decisions(owner, since) if d.verdict == "refused")
    return list(dict.fromkeys(Refused(d.host, d.port, d.reason) for d in refused))


async def in_thread[T](
    function: Callable[..., T], *args: Any, on_cancel: Callable[[], None] | None = None
) -> T:
    """Run ``function`` in a thread, to its end even when cancelled, and only then be cancelled.

    ``on_cancel`` is called at once, to make the function end soon.
    """
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is None:
        return work.result()
    if not work.cancelled() and (failure := work.exception()) is not None:
        _log.info("cancelled work ended by %s", failure)
    raise cancelled


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


__all__ = ["Assembly", "BuildFailed", "Emit", "Host", "Plan", "in_thread"]
