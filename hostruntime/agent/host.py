"""All parts of one agent, opened and closed in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from hostruntime import __version__
from hostruntime.agent.ballast import Ballast
from hostruntime.agent.disk_monitor import DiskMonitor
from hostruntime.agent.reclaim import OnProgress, reclaim, remove_instance
from hostruntime.build import plan as build_plan
from hostruntime.build.bases import BaseBuilder
from hostruntime.build.layers import LayerStore, budget_bytes
from hostruntime.build.manager import BuildManager
from hostruntime.container import apparmor, delegation, shared_limits
from hostruntime.container.capacity import Room
from hostruntime.container.cgroup_migrations import favor_migrations
from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.disk import DiskSize
from hostruntime.container.launcher import LauncherPool
from hostruntime.container.manager import ContainerManager, lxc_dir
from hostruntime.container.runtime_layer import build_runtime_layers, remove_unused
from hostruntime.errors import HostError
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.paths import (
    Instance,
    StatePaths,
    claim_instance,
    ensure_subordinate_ids,
    is_claimed,
    release_instance,
)
from hostruntime.host.tasks import cancel_and_wait, create_thread_pool, every, log_errors
from hostruntime.image.quarantine import retention_days
from hostruntime.image.store import ImageStore
from hostruntime.network.egress import EgressProxy, host_registries
from hostruntime.network.policy import PolicyError
from hostruntime.network.slots import SlotPool
from hostruntime.sandbox.manager import SandboxManager
from hostruntime.sandbox.snapshots import image_users
from hostruntime.wire.health import Health

PROXY_CHECK_SECONDS = 5.0
CLEANUP_SECONDS = 3600.0
_THREADS = 64
_log = logging.getLogger(__name__)


@dataclass
class Host:
    """One running installation."""

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
    disk_monitor: DiskMonitor = field(init=False)
    proxy_healthy: bool = False
    _periodic_tasks: tuple[asyncio.Task[None], ...] = ()

    def __post_init__(self) -> None:
        ballast = Ballast(self.paths.ballast)
        self.disk_monitor = DiskMonitor(self.paths.root, self.containers, ballast, self)

    @classmethod
    async def open(cls, paths: StatePaths, inherited_fds: Sequence[int] = ()) -> Host:
        """Open the state directory: reclaim, start the launchers and the proxy.

        Launchers keep ``inherited_fds`` open.  Raises HostError, OSError.
        """
        # A hanging disk blocks the threads that wait for it, and must not block the others.
        asyncio.get_running_loop().set_default_executor(create_thread_pool(_THREADS))
        host = await asyncio.to_thread(_assemble, paths, inherited_fds)
        # Meanwhile: it mostly waits for other programs.
        proxy = asyncio.create_task(host._check_proxy(first=True))
        try:
            await host.launchers.open()
            await host.sandboxes.recover()
            await host.sandboxes.refreeze_paused()
            host.sandboxes.start_sweeping()
            await host.builds.recover()
        finally:
            await proxy
        await host.bases.recover()
        host._periodic_tasks = (
            every(
                PROXY_CHECK_SECONDS, host._maintain_network, "the network could not be maintained"
            ),
            every(CLEANUP_SECONDS, host._remove_old, "old layers and builds could not be removed"),
            host.disk_monitor.start(),
        )
        return host

    async def close(self) -> None:
        """Stop everything except the containers of sandboxes, and the proxy, which serves them."""
        await cancel_and_wait(*self._periodic_tasks)
        self.disk_monitor.close()
        self.sandboxes.snapshots.close()
        await self.sandboxes.close()
        await self.bases.close()
        await self.builds.close()
        self.containers.kill_commands()
        await self.launchers.close()
        await self.containers.close()
        await asyncio.to_thread(self.pool.close)

    def health(self) -> Health:
        """The response to ``GET /health``."""
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
            notes=[*host_registries(self.paths).notes, *self.disk_monitor.notes()],
            room=self.disk_monitor.status(),
            capacity=self.containers.capacity.status(),
        )

    # Relief for the disk monitor -------------------------------------------------------------

    async def free_space(self) -> None:
        """Abort what uses more space, and delete what can be created again."""
        self.sandboxes.snapshots.abort_for_space()
        await self.sandboxes.warm.stop_all()
        await asyncio.to_thread(self.layers.collect)
        self.store.trash.empty()

    def is_build(self, owner: str) -> bool:
        """Whether an owner is a build, of a template or of a base."""
        return owner not in self.sandboxes.live()

    def volume_sizes(self) -> Mapping[str, DiskSize]:
        """What attached volumes take, by sandbox."""
        return self.sandboxes.volumes.sizes()

    async def terminate_for_space(self, owner: str) -> None:
        """Terminate an owner's container and record why.  Raises HostError, OSError."""
        if owner in self.sandboxes.live():
            await self.sandboxes.terminate_for_space(owner)
        elif owner in self.builds.users():
            await self.builds.terminate_for_space(owner)
        else:
            self.containers.kill(owner)

    def capturing(self) -> list[str]:
        """The builds whose container has exited and whose tree is being captured; newest last."""
        return [owner for owner in self.builds.users() if owner not in self.containers.running()]

    # Periodic work; a failing part must not prevent the others --------------------------------

    async def _maintain_network(self) -> None:
        with log_errors("the firewall could not be checked"):
            await asyncio.to_thread(self.pool.firewall.ensure_intact)
        with log_errors("the AppArmor profile could not be checked"):
            await asyncio.to_thread(self._ensure_profile)
        with log_errors("a launcher near a limit could not be replaced"):
            await self.launchers.maintain()
        with log_errors("the containers' connection attempts could not be read"):
            await asyncio.to_thread(self.pool.record_attempts)
        with log_errors("the egress proxy could not be checked"):
            await self._check_proxy(first=False)

    async def _remove_old(self) -> None:
        with log_errors("old layers could not be deleted"):
            await asyncio.to_thread(self.layers.collect)
        with log_errors("unused runtime layers could not be deleted"):
            await asyncio.to_thread(remove_unused, self.paths)
        with log_errors("the records of old builds could not be deleted"):
            await self.builds.delete_old_records()

    def _ensure_profile(self) -> None:
        if (label := apparmor.profile_name(self.instance)) is not None:
            apparmor.ensure_loaded(label)

    async def _check_proxy(self, *, first: bool) -> None:
        try:
            await asyncio.to_thread(self.proxy.start if first else self.proxy.ensure)
            self.proxy_healthy = True
        except (HostError, PolicyError, OSError) as error:
            if self.proxy_healthy or first:
                _log.error("the egress proxy is not running: %s", error)
            self.proxy_healthy = False


def _assemble(paths: StatePaths, inherited_fds: Sequence[int]) -> Host:
    cgroup_layout()
    # Invalid settings must fail here, and not in a later reconciliation.
    retention_days()
    DiskSpace.of(paths.root)
    Room.of_machine()
    ensure_subordinate_ids()
    instance = claim_instance(paths)
    delegation.set_up(instance)
    pool = SlotPool(paths, instance)
    launchers = _launchers(paths, instance, inherited_fds)
    pool.setup()
    # After pool.setup, which loads connection tracking and its sysctls.
    _limit_machine_use(instance)
    store = ImageStore(paths)
    with ThreadPoolExecutor(1) as other:
        # It asks the machine's package managers, which takes them a second or more.
        layers = other.submit(build_runtime_layers, paths, pool)
        live = reclaim(paths, instance, pool, store)
        layers.result()
    _log.info("instance %d, %d sandboxes still running", instance.index, len(live))
    return _host(paths, instance, store, ContainerManager(paths, instance, pool, launchers))


def _launchers(paths: StatePaths, instance: Instance, inherited_fds: Sequence[int]) -> LauncherPool:
    """The launchers, not started yet; loads the AppArmor profile that they need."""
    label = apparmor.profile_name(instance)
    if label is not None:
        apparmor.load(label)
    return LauncherPool(lxc_dir(instance), paths.root / "launcher.log", inherited_fds, label)


def _host(
    paths: StatePaths, instance: Instance, store: ImageStore, containers: ContainerManager
) -> Host:
    containers.disks.delete = store.trash.discard
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
        sandboxes=SandboxManager(paths, containers, store, refusals=proxy.refusals),
        builds=BuildManager(paths, engine),
        bases=BaseBuilder(paths, engine, partial(host_registries, paths), proxy.refresh),
        layers=layers,
    )


def _limit_machine_use(instance: Instance) -> None:
    shared_limits.raise_limits()
    favor_migrations()
    try:
        shared_limits.limit_processes(instance)
    except (HostError, OSError) as error:
        # Each container has its own limit, so this failure must not block the start.
        _log.error("the processes of all sandboxes together could not be limited: %s", error)


def tear_down(paths: StatePaths, on_progress: OnProgress = lambda done, of: None) -> None:
    """Stop every container and remove all its resources; images and snapshots stay.

    ``on_progress`` is called with the number of removed containers and the total.  No agent may be
    running on the state directory.  Raises HostError, OSError.
    """
    if not is_claimed(paths):
        return
    instance = claim_instance(paths)
    pool = SlotPool(paths, instance)
    store = ImageStore(paths)
    remove_instance(paths, instance, store.trash, on_progress)
    EgressProxy(paths, instance, pool).stop()
    pool.teardown()
    delegation.tear_down(instance)
    label = apparmor.profile_name(instance)
    if label is not None:
        apparmor.unload(label)
    for directory in paths.sandboxes.iterdir():
        with contextlib.suppress(OSError):
            store.trash.discard(directory)
    store.recover(image_users(paths))
    store.trash.wait()
    paths.ballast.unlink(missing_ok=True)
    release_instance(paths)
