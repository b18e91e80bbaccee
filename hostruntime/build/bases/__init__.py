"""Making the built-in bases: each once, whoever asks, and again when its definition changes.

:data:`BASES` says what they are.  :class:`BaseBuilder` makes them in the image store, the bases
below first.  A base carries its definition's digest in its manifest; one that no longer agrees
is made anew beside the old one, which stays for as long as something runs on it.

One that could not be made is tried again by itself, after a minute and ever later; those that are
made from it as soon as it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hostruntime.build.assembly import Assembly
from hostruntime.build.bases import cpython
from hostruntime.build.bases.debian import bootstrap
from hostruntime.build.bases.definitions import (
    ASK_NPM,
    BASES,
    NPM_ADDRESS,
    BaseDefinition,
    definition_digest,
)
from hostruntime.build.plan import Host, Plan
from hostruntime.container.cgroups import Limits
from hostruntime.errors import BuildFailed, HostError, HostUnavailable, ImageNotFound
from hostruntime.host.paths import StatePaths
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import KeyedLocks, cancel_and_wait, in_background, in_thread
from hostruntime.image.capture import capture
from hostruntime.image.digest import image_digest
from hostruntime.image.scrub import scrub
from hostruntime.image.store import ALIASES, Image, ImageManifest
from hostruntime.image.trees import Inventory, Measure, inventory
from hostruntime.network.policy import DEFAULT_LIST, Policy
from hostruntime.network.registries import Registries
from hostruntime.wire.images import BaseInfo

__all__ = ["BASES", "BaseBuilder", "BaseDefinition", "definition_digest"]

Progress = Callable[[str], None]
_STEP_TIMEOUT = 1200.0
_BUILD_TIMEOUT = 3600.0
_LIMITS = Limits(cpu=2.0, memory_mb=2048)
_COMMAND_CHARACTERS = 80
# After a failure; twice as long after each further one.
_AGAIN_SECONDS = 60.0
_LONGEST_AGAIN_SECONDS = 1800.0
_RESTRICTED = Policy("restricted")
_log = logging.getLogger(__name__)


@dataclass
class _Making:
    """A base being made: the messages so far and who listens."""

    task: asyncio.Task[Image]
    said: list[str] = field(default_factory=list)
    listeners: list[Progress] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.said.append(message)
        for listener in list(self.listeners):
            listener(message)


class BaseBuilder:
    """Makes the built-in bases of one host.  For one event loop."""

    def __init__(
        self,
        paths: StatePaths,
        host: Host,
        registries: Callable[[], Registries],
        learned: Callable[[], None],
    ) -> None:
        """``learned`` is called when ``registries`` may answer more than before."""
        self._paths = paths
        self._host = host
        self._registries = registries
        self._learned = learned
        self._making: dict[str, _Making] = {}
        self._failed: dict[str, str] = {}
        # How often in a row, and when the next attempt is.
        self._failures: Counter[str] = Counter()
        self._again: dict[str, asyncio.TimerHandle] = {}
        self._later: set[asyncio.Task[None]] = set()
        self._asking = KeyedLocks()

    async def catalogue(self) -> list[BaseInfo]:
        """Every built-in base and whether it can be used."""
        images = await in_thread(lambda: [self._ready(base) for base in BASES.values()])
        return [self._status(*one) for one in zip(BASES.values(), images, strict=True)]

    async def ensure(self, name: str, progress: Progress) -> Image:
        """The base's image, made first if it is missing or out of date; ``progress`` is told how.

        Any number may ask at once: it is made once, and goes on if those who asked go away.
        Raises ImageNotFound for an unknown name, and why it could not be made as HostError.
        """
        base = BASES.get(ALIASES.get(name, name))
        if base is None:
            known = ", ".join(BASES)
            raise ImageNotFound(f"There is no built-in base {name!r}. There are: {known}.")
        async with self._asking.holding(base.name):
            # One at a time: whether it is there, and who makes it if it is not.
            making = self._making.get(base.name)
            if making is None:
                ready = await in_thread(self._ready, base)
                if ready is not None:
                    return ready
                making = self._making.get(base.name) or self._begin(base)
        with _listening(making, progress):
            return await asyncio.shield(making.task)

    async def close(self) -> None:
        """Stop making bases; nothing half-made is left."""
        await cancel_and_wait(*self._later)
        for again in self._again.values():
            again.cancel()
        tasks = [making.task for making in self._making.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside -------------------------------------------------------------------------------

    def _status(self, base: BaseDefinition, image: Image | None) -> BaseInfo:
        state = "missing"
        if image is not None:
            state = "ready"
        elif base.name in self._making:
            state = "building"
        elif base.name in self._failed:
            state = "failed"
        return BaseInfo(
            name=base.name,
            title=base.title,
            description=base.description,
            state=state,
            size_bytes=image.manifest.size_bytes if image else None,
            digest=definition_digest(base),
            error=self._failed.get(base.name) if image is None else None,
        )

    def _ready(self, base: BaseDefinition) -> Image | None:
        with contextlib.suppress(ImageNotFound):
            image = self._host.store.get(base.name)
            if image.manifest.definition == definition_digest(base):
                return image
        return None

    def _begin(self, base: BaseDefinition) -> _Making:
        self._failed.pop(base.name, None)
        if again := self._again.pop(base.name, None):
            again.cancel()
        task = asyncio.create_task(self._make(base), name=f"base {base.name}")
        making = self._making[base.name] = _Making(task)
        task.add_done_callback(lambda done: self._on_end(base, done))
        return making

    def _on_end(self, base: BaseDefinition, task: asyncio.Task[Image]) -> None:
        self._making.pop(base.name, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._failures.pop(base.name, None)
            for above in BASES.values():
                if above.parent == base.name and above.name in self._failed:
                    self._begin(above)
            return
        _log.error("the base %s could not be made", base.name, exc_info=error)
        self._failed[base.name] = error.detail if isinstance(error, HostError) else str(error)
        self._later = {task for task in self._later if not task.done()}
        self._later.add(in_background(self._unless_below(base), f"{base.name} is not tried again"))

    async def _unless_below(self, base: BaseDefinition) -> None:
        """Try again by itself, unless that is for the base below to bring about."""
        below = None if base.parent is None else BASES[base.parent]
        if below is None or await in_thread(self._ready, below) is not None:
            self._try_again(base)

    def _try_again(self, base: BaseDefinition) -> None:
        """Later, and ever later: a mirror that is away comes back without telling us."""
        seconds = min(_AGAIN_SECONDS * 2 ** self._failures[base.name], _LONGEST_AGAIN_SECONDS)
        self._failures[base.name] += 1
        loop = asyncio.get_running_loop()
        self._again[base.name] = loop.call_later(seconds, self._begin, base)

    async def _make(self, base: BaseDefinition) -> Image:
        say = self._making[base.name].say
        if base.parent is not None:
            await self.ensure(base.parent, say)
        say(f"Making {base.title}")
        if base.provider == "debian":
            return await self._make_from_debian(base, say)
        if base.provider == "cpython":
            return await self._make_with_python(base, say)
        if base.provider == "npm":
            return await self._make_with_npm(base, say)
        return await self._assemble(base, base.recipe, say)

    async def _make_from_debian(self, base: BaseDefinition, say: Progress) -> Image:
        store = self._host.store
        staged = await in_thread(store.staging, base.name)
        began = time.monotonic()
        try:
            registries = await in_thread(self._registries)
            fresh = staged / "bootstrap"
            await bootstrap(base, fresh, registries.apt, say)
            found = await in_thread(_finish_tree, fresh, staged / "tree")
            await in_thread(store.trash.discard, fresh)
            await in_thread(store.keep_holdings, staged, None, found)
            digest = await in_thread(image_digest, staged / "tree")
            details = {"made_in_seconds": _elapsed(began)}
            manifest = replace(_manifest(base, found.measure(), details), digest=digest)
            image = await in_thread(store.publish, staged, manifest)
        except BaseException:
            await in_thread(store.trash.discard, staged)
            raise
        say(_published(image))
        return image

    async def _make_with_python(self, base: BaseDefinition, say: Progress) -> Image:
        """Try one CPython after the other until one works inside."""
        reasons: list[str] = []
        fetched = self._paths.staging / f"{base.name}-uv"
        try:
            async for prefix in self._pythons(fetched, reasons, say):
                try:
                    tree = await in_thread(cpython.inspect, prefix)
                    say(f"Trying the CPython in {prefix}")
                    recipe = tuple(
                        step.replace("{packages}", " ".join(tree.packages)) for step in base.recipe
                    )
                    return await self._assemble(base, recipe, say, tree)
                except (BuildFailed, cpython.PythonUnfit) as error:
                    reasons.append(f"{prefix}: {error.detail}")
                    say(f"It cannot be used: {error.detail}")
        finally:
            await in_thread(self._host.store.trash.discard, fetched)
        raise HostUnavailable(
            f"No CPython {cpython.VERSION} for the base {base.name} could be used. Set "
            "ORKESTR_PYTHON312 to the prefix of one that runs on Debian 12. Tried: "
            + "; ".join(reasons)
        )

    async def _make_with_npm(self, base: BaseDefinition, say: Progress) -> Image:
        """Make it from npm's registry; a host that has no npm is told by Debian's which that is."""
        registries = await in_thread(self._registries)
        if registries.npm is not None:
            return await self._assemble(base, base.recipe, say)
        say("Asking Debian's npm for its registry")
        asking = replace(base, name=f"{base.name}-registry")
        store = self._host.store
        try:
            asked = await self._assemble(asking, ASK_NPM, lambda _: None)
            address = (await in_thread((asked.tree / NPM_ADDRESS).read_text)).strip()
        finally:
            await in_thread(store.delete, asking.name)
        domain = urlsplit(address).hostname or ""
        policy = Policy.parse("restricted", [DEFAULT_LIST, domain])
        image = await self._assemble(base, base.recipe, say, policy=policy)
        # The new base has an npm that can be asked from now on.
        await in_thread(self._learned)
        return image

    async def _pythons(self, fetched: Path, reasons: list[str], say: Progress) -> Any:
        for prefix in await in_thread(lambda: list(cpython.found_on_host())):
            yield prefix
        say("Fetching a CPython with uv")
        try:
            yield await in_thread(cpython.installed_by_uv, fetched)
        except HostError as error:
            reasons.append(error.detail)

    async def _assemble(
        self,
        base: BaseDefinition,
        recipe: tuple[str, ...],
        say: Progress,
        python: cpython.PythonTree | None = None,
        policy: Policy = _RESTRICTED,
    ) -> Image:
        assert base.parent is not None
        details = {"python": str(python.prefix)} if python else {}
        plan = Plan(
            image_id=base.name,
            kind="base",
            base=base.parent,
            recipe=recipe,
            policy=policy,
            limits=_LIMITS,
            step_timeout=scaled(_STEP_TIMEOUT),
            build_timeout=scaled(_BUILD_TIMEOUT),
            directory=self._paths.builds / base.name,
            provide=partial(cpython.provide, python) if python else None,
            definition=definition_digest(base),
            details=details,
        )
        try:
            image = (await Assembly(self._host, plan, partial(_tell, say)).run()).image
        finally:
            await in_thread(self._host.store.trash.discard, plan.directory)
        say(_published(image))
        return image


@contextlib.contextmanager
def _listening(making: _Making, progress: Progress) -> Iterator[None]:
    for message in making.said:
        progress(message)
    making.listeners.append(progress)
    try:
        yield
    finally:
        making.listeners.remove(progress)


def _finish_tree(fresh: Path, tree: Path) -> Inventory:
    """What a template's capture does, over nothing: devices out, mount points in, scrubbed."""
    nothing = fresh.with_name("nothing")
    nothing.mkdir()
    capture(nothing, fresh, tree)
    nothing.rmdir()
    scrub(tree)
    return inventory(tree)


def _manifest(base: BaseDefinition, measured: Measure, details: dict[str, Any]) -> ImageManifest:
    return ImageManifest(
        id=base.name,
        kind="base",
        base=base.parent,
        created_at=time.time(),
        size_bytes=measured.size_bytes,
        file_count=measured.file_count,
        shared_bytes=measured.shared_bytes,
        definition=definition_digest(base),
        details=details,
    )


def _tell(say: Progress, kind: str, /, **fields: Any) -> None:
    """An assembly's events in words."""
    if kind == "step_started":
        command = str(fields["command"])
        short = command[:_COMMAND_CHARACTERS] + ("…" if len(command) > _COMMAND_CHARACTERS else "")
        say(f"Step {fields['step']} of {fields['total']}: {short}")
    elif kind == "capture":
        say(f"Captured {fields['file_count']:,} files in {fields['duration_ms']} ms")


def _published(image: Image) -> str:
    megabytes = image.manifest.size_bytes / 1_000_000
    return f"{image.id} is ready: {megabytes:,.0f} MB, {image.manifest.file_count:,} files"


def _elapsed(began: float) -> float:
    return round(time.monotonic() - began, 1)
