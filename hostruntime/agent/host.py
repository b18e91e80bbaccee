"""Everything one agent runs, opened and closed in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from hostruntime import __version__
from hostruntime.agent.ballast import Ballast
from hostruntime.agent.reclaim import Told, reclaim, take_down
from hostruntime.agent.room_watch import RoomWatch
from hostruntime.build import plan as build_plan
from hostruntime.build.bases import BaseBuilder
from hostruntime.build.layers import LayerStore, budget_bytes
from hostruntime.build.manager import BuildManager
from hostruntime.container import apparmor, delegation, shared_limits
from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.launcher import LauncherPool
from hostruntime.container.manager import ContainerManager, lxcpath_of
from hostruntime.container.runtime_layer import build_runtime_layers, remove_unused
from hostruntime.errors import HostError
from hostruntime.host.paths import (
    Instance,
    StatePaths,
    claim_instance,
    ensure_subordinate_ids,
    release_instance,
)
from hostruntime.host.room import Room
from hostruntime.host.tasks import end, every, logged, threads
from hostruntime.image.quarantine import keep_days
from hostruntime.image.store import ImageStore
from hostruntime.network.egress import EgressProxy, host_registries
from hostruntime.network.policy import PolicyError
from hostruntime.network.slots import SlotPool
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.sandbox.snapshots import users_of_images
from hostruntime.wire.health import Health

PROXY_CHECK_SECONDS = 5.0
LAYERS_CHECK_SECONDS = 3600.0
_THREADS = 64
_log = logging.getLogger(__name__)


@dataclass
class Host:
    """One installation at work."""

    paths: StatePaths
    instance: Instance
    pool: SlotPool
    proxy: EgressProxy
    store: ImageStore
    launchers: LauncherPool
    containers: ContainerManager
    sandboxes: SandboxManager
    builds: BuildManager
    bases: BaseBuilder
    layers: LayerStore
    room: RoomWatch = field(init=False)
    proxy_healthy: bool = False
    _keepers: tuple[asyncio.Task[None], ...] = ()

    def __post_init__(self) -> None:
        ballast = Ballast(self.paths.ballast)
        self.room = RoomWatch(self.paths.root, self.containers, ballast, self)

    @classmethod
    async def open(cls, paths: StatePaths, keep: Sequence[int] = ()) -> Host:
        """Take up the state directory: reclaim, start the launchers and the proxy.

        ``keep`` are descriptors for the launchers to hold.  Raises HostError, OSError.
        """
        # A disk that hangs keeps whoever waits for it, and must not keep everybody else.
        asyncio.get_running_loop().set_default_executor(threads(_THREADS))
        host = await asyncio.to_thread(_assemble, paths, keep)
        await host.launchers.open()
        await host.sandboxes.recover()
        await host.sandboxes.freeze_again()
        host.sandboxes.begin()
        await host.builds.recover()
        await host._check_proxy(first=True)
        host._keepers = (
            every(PROXY_CHECK_SECONDS, host._keep_network, "the network could not be seen to"),
            every(LAYERS_CHECK_SECONDS, host._keep_old, "old layers and builds stay"),
            host.room.begin(),
        )
        return host

    async def close(self) -> None:
        """End everything but the containers of sandboxes and the proxy, which serves them."""
        await end(*self._keepers)
        self.room.close()
        self.sandboxes.snapshots.close()
        await self.sandboxes.close()
        await self.bases.close()
        await self.builds.close()
        self.containers.kill_execs()
        await self.launchers.close()
        await self.containers.close()
        await asyncio.to_thread(self.pool.close)

    def health(self) -> Health:
        """The answer to ``GET /health``."""
        running = len(self.containers.running())
        address, port = self.pool.proxy_address()
        return Health(
            version=__version__,
            state_dir=str(self.paths.root),
            instance=self.instance.index,
            cgroup=cgroup_layout().kind,
            proxy={"healthy": self.proxy_healthy, "address": f"{address}:{port}"},
            counts={
                "containers": running,
                "sandboxes": len(self.sandboxes.live()),
                "builds": len(self.builds.users()),
                "images": len(self.store.list()),
            },
            notes=[*host_registries(self.paths).notes, *self.room.notes()],
            room=self.room.status(),
        )

    # What the watch of the room asks for -----------------------------------------------------

    async def drop_what_can_be(self) -> None:
        """Begin nothing more that takes room, and delete what is made again."""
        self.sandboxes.snapshots.make_room()
        await asyncio.to_thread(self.layers.collect)
        self.store.trash.empty()

    def is_build(self, owner: str) -> bool:
        """Whether what an owner runs is a build, of a template or of a base."""
        return owner not in self.sandboxes.live()

    async def end_for_room(self, owner: str) -> None:
        """End what an owner runs, and tell them why.  Raises HostError, OSError."""
        if owner in self.sandboxes.live():
            await self.sandboxes.end_for_room(owner)
        elif owner in self.builds.users():
            await self.builds.end_for_room(owner)
        else:
            self.containers.kill(owner)

    def capturing(self) -> list[str]:
        """The builds whose container has ended, and whose tree is being made; the newest last."""
        return [one for one in self.builds.users() if one not in self.containers.running()]

    # What is done again and again; no part of it keeps another from its turn ------------------

    async def _keep_network(self) -> None:
        with logged("the firewall could not be checked"):
            await asyncio.to_thread(self.pool.firewall.ensure_whole)
        with logged("the AppArmor profile could not be checked"):
            await asyncio.to_thread(self._ensure_profile)
        with logged("a launcher near a limit could not be replaced"):
            await self.launchers.tend()
        with logged("what containers tried to reach could not be read"):
            await asyncio.to_thread(self.pool.record_attempts)
        with logged("the egress proxy could not be checked"):
            await self._check_proxy(first=False)

    async def _keep_old(self) -> None:
        with logged("old layers could not be deleted"):
            await asyncio.to_thread(self.layers.collect)
        with logged("runtime layers that nobody uses could not be deleted"):
            await asyncio.to_thread(remove_unused, self.paths)
        with logged("the records of old builds could not be deleted"):
            await self.builds.forget_old()

    def _ensure_profile(self) -> None:
        if (label := apparmor.profile_name(self.instance)) is not None:
            apparmor.ensure_loaded(label)

    async def _check_proxy(self, *, first: bool) -> None:
        try:
            await asyncio.to_thread(self.proxy.start if first else self.proxy.ensure)
            self.proxy_healthy = True
        except (HostError, PolicyError, OSError) as error:
            if self.proxy_healthy or first:
                _log.error("the egress proxy does not run: %s", error)
            self.proxy_healthy = False


def _assemble(paths: StatePaths, keep: Sequence[int]) -> Host:
    cgroup_layout()
    # Said now, and not to whoever reconciles.
    keep_days()
    Room.of(paths.root)
    ensure_subordinate_ids()
    instance = claim_instance(paths)
    delegation.set_up(instance)
    pool = SlotPool(paths, instance)
    launchers = _launchers(paths, instance, keep)
    pool.setup()
    # Now that the kernel tracks connections.
    _share_the_machine(instance)
    build_runtime_layers(paths, pool)
    store = ImageStore(paths)
    live = reclaim(paths, instance, pool, store)
    _log.info("instance %d, %d sandboxes still run", instance.index, len(live))
    return _host(paths, instance, store, ContainerManager(paths, instance, pool, launchers))


def _launchers(paths: StatePaths, instance: Instance, keep: Sequence[int]) -> LauncherPool:
    """The launchers, which are yet to be started, with the profile they need in the kernel."""
    label = apparmor.profile_name(instance)
    if label is not None:
        apparmor.load(label)
    return LauncherPool(lxcpath_of(instance), paths.root / "launcher.log", keep, label)


def _host(
    paths: StatePaths, instance: Instance, store: ImageStore, containers: ContainerManager
) -> Host:
    proxy = EgressProxy(paths, instance, containers.pool)
    layers = LayerStore(paths, store.trash, budget_bytes(paths))
    engine = build_plan.Host(
        store,
        containers,
        containers.runtime.tree,
        partial(build_plan.refused_hosts, proxy),
        layers,
        partial(build_plan.unreached_hosts, proxy),
    )
    return Host(
        paths=paths,
        instance=instance,
        pool=containers.pool,
        proxy=proxy,
        store=store,
        launchers=containers.launchers,
        containers=containers,
        sandboxes=SandboxManager(paths, containers, store),
        builds=BuildManager(paths, engine),
        bases=BaseBuilder(paths, engine, partial(host_registries, paths), proxy.refresh),
        layers=layers,
    )


def _share_the_machine(instance: Instance) -> None:
    shared_limits.raise_limits()
    try:
        shared_limits.limit_processes(instance)
    except (HostError, OSError) as error:
        # Each container has its own limit, and nobody's sandbox is to wait for this one.
        _log.error("what all sandboxes may run together could not be limited: %s", error)


def tear_down(paths: StatePaths, told: Told = lambda done, of: None) -> None:
    """Stop every container and remove all it has on the host; images and snapshots stay.

    ``told`` hears how many of how many containers are gone.  No agent may run on the state
    directory.  Raises HostError, OSError.
    """
    if not paths.instance_file.exists():
        return
    instance = claim_instance(paths)
    pool = SlotPool(paths, instance)
    store = ImageStore(paths)
    take_down(paths, instance, store.trash, told)
    EgressProxy(paths, instance, pool).stop()
    pool.teardown()
    delegation.tear_down(instance)
    label = apparmor.profile_name(instance)
    if label is not None:
        apparmor.unload(label)
    for directory in paths.sandboxes.iterdir():
        with contextlib.suppress(OSError):
            store.trash.discard(directory)
    store.recover(users_of_images(paths))
    store.trash.wait()
    paths.ballast.unlink(missing_ok=True)
    release_instance(paths)
