"""A host runtime without its HTTP surface: real slots, proxy, launchers, containers, images."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hostruntime.build.bases import BaseBuilder
from hostruntime.build.layers import LayerStore, budget_bytes
from hostruntime.build.manager import BuildManager
from hostruntime.build.plan import Host, refused_hosts
from hostruntime.container import delegation
from hostruntime.container.apparmor import profile_name
from hostruntime.container.launcher import LauncherPool
from hostruntime.container.manager import ContainerManager
from hostruntime.container.runtime_layer import build_runtime_layers
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.rundir import RunDir
from hostruntime.host.tasks import in_thread
from hostruntime.image.store import ImageStore
from hostruntime.network.egress import EgressProxy, host_registries
from hostruntime.network.slots import SlotPool


@dataclass(frozen=True)
class Machine:
    """The parts of a host agent that builds and bases need."""

    paths: StatePaths
    store: ImageStore
    containers: ContainerManager
    bases: BaseBuilder
    builds: BuildManager


@asynccontextmanager
async def a_machine(root: Path) -> AsyncIterator[Machine]:
    """Bring up the parts in the state directory ``root``; take every trace off the host again."""
    paths = StatePaths(root).ensure()
    async with AsyncExitStack() as stack:
        instance = claim_instance(paths)
        stack.callback(release_instance, paths)
        stack.callback(delegation.tear_down, instance)
        delegation.set_up(instance)
        pool = SlotPool(paths, instance)
        stack.push_async_callback(in_thread, pool.teardown)
        await in_thread(pool.setup)
        await in_thread(pool.reclaim, set())
        proxy = EgressProxy(paths, instance, pool)
        stack.push_async_callback(in_thread, proxy.stop)
        await in_thread(build_runtime_layers, paths, pool)
        await in_thread(proxy.start)
        launchers = LauncherPool(
            RunDir.of(instance).lxc, root / "launcher.log", apparmor=profile_name(instance)
        )
        stack.push_async_callback(launchers.close)
        await launchers.open()
        containers = ContainerManager(paths, instance, pool, launchers)
        stack.push_async_callback(containers.close)
        store = ImageStore(paths)
        store.recover(set())
        layers = LayerStore(paths, store.trash, budget_bytes(paths))
        host = Host(
            store,
            containers,
            containers.runtime.tree,
            partial(refused_hosts, proxy),
            layers,
        )
        builds = BuildManager(paths, host)
        await builds.recover()
        bases = BaseBuilder(paths, host, partial(host_registries, paths), proxy.refresh)
        yield Machine(paths, store, containers, bases, builds)
        await builds.close()
        await bases.close()
        store.trash.wait()
