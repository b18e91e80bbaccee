"""Build the built-in bases: each once, on demand, and again when its definition changes.

:data:`BASES` defines them. :class:`BaseBuilder` builds them in the image store, parents first. A
base has its definition's digest in its manifest; if the definition changes, the base is rebuilt,
and the old image stays as long as something runs on it.

A failed build is retried automatically, after a minute and then at growing intervals; bases that
depend on a failed one are built as soon as it succeeds. A base ``on_request`` is built when it is
first asked for. If that fails, it is tried again when it is asked for again; if the agent ends, the
next one continues, because a file in :attr:`StatePaths.wanted_bases` says that it is wanted.
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
from hostruntime.build.bases import cpython, provided
from hostruntime.build.bases.debian import bootstrap
from hostruntime.build.bases.definitions import (
    BASES,
    NPM_QUERY_RECIPE,
    NPM_REGISTRY_FILE,
    BaseDefinition,
    definition_digest,
)
from hostruntime.build.plan import Host, Plan
from hostruntime.container.limits import Limits
from hostruntime.errors import BuildFailed, HostError, HostUnavailable, ImageNotFound
from hostruntime.host.paths import StatePaths
from hostruntime.host.patience import scaled
from hostruntime.host.tasks import KeyedLocks, cancel_and_wait, in_background, in_thread, log_errors
from hostruntime.image.capture import capture
from hostruntime.image.digest import image_digest
from hostruntime.image.scrub import scrub
from hostruntime.image.store import ALIASES, Image, ImageManifest
from hostruntime.image.trees import Inventory, TreeSize, inventory
from hostruntime.network.policy import DEFAULT_LIST, Policy
from hostruntime.network.registries import Registries
from hostruntime.wire.images import BaseInfo

__all__ = ["BASES", "BaseBuilder", "BaseDefinition", "definition_digest"]

Progress = Callable[[str], None]
_STEP_TIMEOUT = 1200.0
_BUILD_TIMEOUT = 3600.0
_LIMITS = Limits(cpu=2.0, memory_mb=2048)
_COMMAND_CHARACTERS = 80
# The delay after a failure; doubled after each further one.
_RETRY_SECONDS = 60.0
_MAX_RETRY_SECONDS = 1800.0
_RESTRICTED = Policy("restricted")
_log = logging.getLogger(__name__)


@dataclass
class _BaseBuild:
    """A base being built: its messages so far and its listeners."""

    task: asyncio.Task[Image]
    messages: list[str] = field(default_factory=list)
    listeners: list[Progress] = field(default_factory=list)

    def report(self, message: str) -> None:
        self.messages.append(message)
        for listener in list(self.listeners):
            listener(message)


class BaseBuilder:
    """Builds the built-in bases of one host; for use in one event loop."""

    def __init__(
        self,
        paths: StatePaths,
        host: Host,
        registries: Callable[[], Registries],
        registries_changed: Callable[[], None],
    ) -> None:
        """``registries_changed`` is called when ``registries`` may have more to return."""
        self._paths = paths
        self._host = host
        self._registries = registries
        self._registries_changed = registries_changed
        self._building: dict[str, _BaseBuild] = {}
        self._failed: dict[str, str] = {}
        # The number of consecutive failures, and the timers of the next attempts.
        self._failures: Counter[str] = Counter()
        self._retries: dict[str, asyncio.TimerHandle] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._locks = KeyedLocks()

    async def catalogue(self) -> list[BaseInfo]:
        """Return every built-in base with its state."""
        images = await in_thread(lambda: [self._ready(base) for base in BASES.values()])
        return [self._status(*pair) for pair in zip(BASES.values(), images, strict=True)]

    async def ensure(self, name: str, progress: Progress) -> Image:
        """Return the base's image; build it first, reporting ``progress``, if missing or outdated.

        Concurrent calls share one build, which continues if the callers are cancelled.
        Raises ImageNotFound for an unknown name, HostError if the build fails.
        """
        found = await self._find_or_start(_definition(name))
        if not isinstance(found, _BaseBuild):
            return found
        with _subscribed(found, progress):
            return await asyncio.shield(found.task)

    async def request(self, name: str) -> BaseInfo:
        """Have a base built unless it is ready, and return its state without waiting for it.

        Raises ImageNotFound for an unknown name.
        """
        base = _definition(name)
        found = await self._find_or_start(base)
        return self._status(base, None if isinstance(found, _BaseBuild) else found)

    async def recover(self) -> None:
        """Continue what was asked for before the agent ended, and replace what is outdated.

        What cannot be looked at is logged: an agent without a base is worth more than none.
        """
        for base in BASES.values():
            with log_errors(f"the base {base.name} could not be continued"):
                if base.on_request and await in_thread(self._is_wanted, base):
                    await self._find_or_start(base)

    async def close(self) -> None:
        """Stop building bases, and remove partial results."""
        await cancel_and_wait(*self._background)
        for retry in self._retries.values():
            retry.cancel()
        tasks = [build.task for build in self._building.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Inside -------------------------------------------------------------------------------

    async def _find_or_start(self, base: BaseDefinition) -> Image | _BaseBuild:
        """The base's image, or the build that makes it."""
        async with self._locks.holding(base.name):
            # One caller at a time checks whether the base exists, and starts the build if not.
            build = self._building.get(base.name)
            if build is None:
                ready = await in_thread(self._ready, base)
                if ready is not None:
                    return ready
                build = self._building.get(base.name) or self._start(base)
            return build

    def _is_wanted(self, base: BaseDefinition) -> bool:
        return self._marker(base).exists() or self._host.store.exists(base.name)

    def _marker(self, base: BaseDefinition) -> Path:
        return self._paths.wanted_bases / base.name

    def _status(self, base: BaseDefinition, image: Image | None) -> BaseInfo:
        state = "missing"
        build = self._building.get(base.name) if image is None else None
        if image is not None:
            state = "ready"
        elif build is not None:
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
            on_request=base.on_request,
            progress=build.messages[-1] if build is not None and build.messages else None,
        )

    def _ready(self, base: BaseDefinition) -> Image | None:
        with contextlib.suppress(ImageNotFound):
            image = self._host.store.get(base.name)
            if image.manifest.definition == definition_digest(base):
                return image
        return None

    def _start(self, base: BaseDefinition) -> _BaseBuild:
        self._failed.pop(base.name, None)
        if retry := self._retries.pop(base.name, None):
            retry.cancel()
        task = asyncio.create_task(self._build(base), name=f"base {base.name}")
        build = self._building[base.name] = _BaseBuild(task)
        task.add_done_callback(lambda done: self._on_finished(base, done))
        return build

    def _on_finished(self, base: BaseDefinition, task: asyncio.Task[Image]) -> None:
        self._building.pop(base.name, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._failures.pop(base.name, None)
            for child in BASES.values():
                waits = child.parent == base.name and child.name in self._failed
                if waits and not child.on_request:
                    self._start(child)
            return
        _log.error("the base %s could not be built", base.name, exc_info=error)
        self._failed[base.name] = error.detail if isinstance(error, HostError) else str(error)
        if base.on_request:
            # Whoever asked is told, and may ask again.
            return
        self._background = {task for task in self._background if not task.done()}
        self._background.add(
            in_background(self._retry_if_parent_ready(base), f"{base.name} is not tried again")
        )

    async def _retry_if_parent_ready(self, base: BaseDefinition) -> None:
        """Schedule a retry, unless the parent is missing: its success starts this one."""
        parent = None if base.parent is None else BASES[base.parent]
        if parent is None or await in_thread(self._ready, parent) is not None:
            self._schedule_retry(base)

    def _schedule_retry(self, base: BaseDefinition) -> None:
        """Retry with exponential backoff: a mirror may come back at any time."""
        seconds = min(_RETRY_SECONDS * 2 ** self._failures[base.name], _MAX_RETRY_SECONDS)
        self._failures[base.name] += 1
        loop = asyncio.get_running_loop()
        self._retries[base.name] = loop.call_later(seconds, self._start, base)

    async def _build(self, base: BaseDefinition) -> Image:
        if not base.on_request:
            return await self._make(base)
        marker = self._marker(base)
        await in_thread(marker.touch, 0o600)
        try:
            image = await self._make(base)
        except Exception:
            await in_thread(partial(marker.unlink, missing_ok=True))
            raise
        # Not if it is cancelled, as the agent ends then.
        await in_thread(partial(marker.unlink, missing_ok=True))
        return image

    async def _make(self, base: BaseDefinition) -> Image:
        report = self._building[base.name].report
        for needed in (base.parent, base.node_from):
            if needed is not None:
                await self.ensure(needed, report)
        report(f"Building {base.title}")
        if base.provider == "debian":
            return await self._build_from_debian(base, report)
        if base.provider == "cpython":
            return await self._build_with_python(base, report)
        if base.provider == "npm":
            return await self._build_with_npm(base, report)
        return await self._assemble(base, base.recipe, report)

    async def _build_from_debian(self, base: BaseDefinition, report: Progress) -> Image:
        store = self._host.store
        staged = await in_thread(store.create_staging, base.name)
        started_at = time.monotonic()
        try:
            registries = await in_thread(self._registries)
            bootstrapped = staged / "bootstrap"
            await bootstrap(base, bootstrapped, registries.apt, report)
            found = await in_thread(_finish_tree, bootstrapped, staged / "tree")
            await in_thread(store.trash.discard, bootstrapped)
            await in_thread(store.record_inodes, staged, None, found)
            digest = await in_thread(image_digest, staged / "tree")
            details = {"made_in_seconds": _elapsed_seconds(started_at)}
            manifest = replace(_manifest(base, found.measure(), details), digest=digest)
            image = await in_thread(store.publish, staged, manifest)
        except BaseException:
            await in_thread(store.trash.discard, staged)
            raise
        report(_ready_message(image))
        return image

    async def _build_with_python(self, base: BaseDefinition, report: Progress) -> Image:
        """Try one CPython after the other until one works in the image."""
        reasons: list[str] = []
        fetched = self._paths.staging / f"{base.name}-uv"
        try:
            async for prefix in self._pythons(fetched, reasons, report):
                try:
                    tree = await in_thread(cpython.inspect, prefix)
                    report(f"Trying the CPython in {prefix}")
                    recipe = tuple(
                        step.replace("{packages}", " ".join(tree.packages)) for step in base.recipe
                    )
                    return await self._assemble(base, recipe, report, tree)
                except (BuildFailed, cpython.UnsuitablePython) as error:
                    reasons.append(f"{prefix}: {error.detail}")
                    report(f"It cannot be used: {error.detail}")
        finally:
            await in_thread(self._host.store.trash.discard, fetched)
        raise HostUnavailable(
            f"No CPython {cpython.VERSION} for the base {base.name} could be used. Set "
            "ORKESTR_PYTHON312 to the prefix of one that runs on Debian 12. Tried: "
            + "; ".join(reasons)
        )

    async def _build_with_npm(self, base: BaseDefinition, report: Progress) -> Image:
        """Build from npm's registry; if the host has no npm, Debian's tells which that is."""
        registries = await in_thread(self._registries)
        if registries.npm is not None:
            return await self._assemble(base, base.recipe, report)
        report("Asking Debian's npm for its registry")
        query = replace(base, name=f"{base.name}-registry")
        store = self._host.store
        try:
            image = await self._assemble(query, NPM_QUERY_RECIPE, lambda _: None)
            address = (await in_thread((image.tree / NPM_REGISTRY_FILE).read_text)).strip()
        finally:
            await in_thread(store.delete, query.name)
        domain = urlsplit(address).hostname or ""
        policy = Policy.parse("restricted", [DEFAULT_LIST, domain])
        image = await self._assemble(base, base.recipe, report, policy=policy)
        # From now on the new base's npm can be queried.
        await in_thread(self._registries_changed)
        return image

    async def _pythons(self, fetched: Path, reasons: list[str], report: Progress) -> Any:
        for prefix in await in_thread(lambda: list(cpython.find_on_host())):
            yield prefix
        report("Installing a CPython with uv")
        try:
            yield await in_thread(cpython.install_with_uv, fetched)
        except HostError as error:
            reasons.append(error.detail)

    async def _assemble(
        self,
        base: BaseDefinition,
        recipe: tuple[str, ...],
        report: Progress,
        python: cpython.PythonTree | None = None,
        policy: Policy = _RESTRICTED,
    ) -> Image:
        assert base.parent is not None
        details = {"python": str(python.prefix)} if python else {}
        provide = partial(cpython.install, python) if python else self._provider(base)
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
            provide=provide,
            definition=definition_digest(base),
            details=details,
        )
        try:
            image = (await Assembly(self._host, plan, partial(_report_event, report)).run()).image
        finally:
            await in_thread(self._host.store.trash.discard, plan.directory)
        report(_ready_message(image))
        return image

    def _provider(self, base: BaseDefinition) -> Callable[[Path], None] | None:
        """What writes a base's own files, and other bases' programs, to a layer."""
        if base.node_from is None and not base.files:
            return None

        def provide(layer: Path) -> None:
            store, user = self._host.store, base.name
            if base.node_from is not None:
                node = store.acquire(base.node_from, user)
                try:
                    provided.copy_node(node.tree, layer)
                finally:
                    store.release(base.node_from, user)
            provided.write_files(base.files, layer)

        return provide


def _definition(name: str) -> BaseDefinition:
    """The definition of a base, by its name or alias.  Raises ImageNotFound."""
    base = BASES.get(ALIASES.get(name, name))
    if base is None:
        known = ", ".join(BASES)
        raise ImageNotFound(f"There is no built-in base {name!r}. There are: {known}.")
    return base


@contextlib.contextmanager
def _subscribed(build: _BaseBuild, progress: Progress) -> Iterator[None]:
    for message in build.messages:
        progress(message)
    build.listeners.append(progress)
    try:
        yield
    finally:
        build.listeners.remove(progress)


def _finish_tree(bootstrapped: Path, tree: Path) -> Inventory:
    """Capture over an empty base: omit devices, add mount points, scrub."""
    empty = bootstrapped.with_name("nothing")
    empty.mkdir()
    capture(empty, bootstrapped, tree)
    empty.rmdir()
    scrub(tree)
    return inventory(tree)


def _manifest(base: BaseDefinition, size: TreeSize, details: dict[str, Any]) -> ImageManifest:
    return ImageManifest(
        id=base.name,
        kind="base",
        base=base.parent,
        created_at=time.time(),
        size_bytes=size.size_bytes,
        file_count=size.file_count,
        shared_bytes=size.shared_bytes,
        definition=definition_digest(base),
        details=details,
    )


def _report_event(report: Progress, kind: str, /, **fields: Any) -> None:
    """Report an assembly's events as text."""
    if kind == "step_started":
        command = str(fields["command"]).partition("\n")[0]
        short = command[:_COMMAND_CHARACTERS] + ("…" if len(command) > _COMMAND_CHARACTERS else "")
        report(f"Step {fields['step']} of {fields['total']}: {short}")
    elif kind == "capture":
        report(f"Captured {fields['file_count']:,} files in {fields['duration_ms']} ms")


def _ready_message(image: Image) -> str:
    megabytes = image.manifest.size_bytes / 1_000_000
    return f"{image.id} is ready: {megabytes:,.0f} MB, {image.manifest.file_count:,} files"


def _elapsed_seconds(started_at: float) -> float:
    return round(time.monotonic() - started_at, 1)
