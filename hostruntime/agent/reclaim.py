"""The cleanup at start, and the removal of a whole instance.

A killed agent leaves things behind: containers (rightly, if a sandbox owns them), roots mounted
for containers that never started, slots, incomplete trees.  Everything that no running sandbox
owns is removed; the kernel's state takes precedence over records.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostruntime.container.cgroups import cgroup_layout, kill_group
from hostruntime.container.disk import Disks
from hostruntime.container.manager import dismantle, lxc_dir, roots_dir
from hostruntime.errors import HostError
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.records import BadRecord
from hostruntime.image.store import ImageStore
from hostruntime.image.trash import Trash
from hostruntime.network.slots import SlotPool
from hostruntime.sandbox.manager import read_sandbox
from hostruntime.sandbox.snapshots import image_users, remove_incomplete

_log = logging.getLogger(__name__)
_PARALLEL = 8

OnProgress = Callable[[int, int], None]


def reclaim(
    paths: StatePaths, instance: Instance, pool: SlotPool, store: ImageStore
) -> frozenset[str]:
    """Remove what nobody owns; return the sandboxes that are still running.

    The pool must be set up.  Raises HostError or OSError if something cannot be removed.
    """
    remove_incomplete(paths, instance, store.trash)
    candidates = _recorded_as_running(paths.sandboxes)
    live = {owner for owner in candidates if _is_running(instance, owner)}
    _dismantle_except(instance, live)
    pool.reclaim(live)
    without_slot = {owner for owner in live if pool.slot_of(owner) is None}
    if without_slot:
        # Without its network namespace or its policy a container must not keep running.
        _log.error("stopping %s: the network slot is gone", ", ".join(sorted(without_slot)))
        _dismantle_except(instance, live - without_slot)
    Disks(paths, instance).release_except(live - without_slot)
    store.recover((live - without_slot) | image_users(paths))
    return frozenset(live - without_slot)


def remove_instance(
    paths: StatePaths,
    instance: Instance,
    trash: Trash,
    on_progress: OnProgress = lambda done, of: None,
) -> None:
    """Stop every container of an instance and remove their groups and mounts; idempotent.

    ``on_progress`` is called after each with the number of removed containers and the total.
    """
    remove_incomplete(paths, instance, trash)
    _dismantle_except(instance, set(), on_progress)
    cgroup_layout().remove_instance(instance.prefix)
    disks = Disks(paths, instance)
    disks.release_except(())
    for directory in (roots_dir(instance), lxc_dir(instance), disks.mounts):
        shutil.rmtree(directory, ignore_errors=True)


def _recorded_as_running(sandboxes: Path) -> set[str]:
    running: set[str] = set()
    for directory in sandboxes.iterdir():
        try:
            sandbox = read_sandbox(directory)
        except BadRecord as error:
            # Its owner, its network policy and its deadline are unknown.
            _log.error("sandbox %s is stopped if it is running: %s", directory.name, error)
            continue
        if sandbox is not None and sandbox.state == "running":
            running.add(directory.name)
    return running


def _is_running(instance: Instance, owner: str) -> bool:
    return cgroup_layout().container(f"{instance.prefix}{owner}").init_pid() is not None


def _dismantle_except(
    instance: Instance, live: set[str], on_progress: OnProgress = lambda done, of: None
) -> None:
    keep = {f"{instance.prefix}{owner}" for owner in live}
    roots = roots_dir(instance)
    names = set(cgroup_layout().container_names(instance.prefix))
    with contextlib.suppress(FileNotFoundError):
        names |= {path.name for path in roots.iterdir()}
    doomed = sorted(names - keep)
    for name in doomed:
        _log.info("removing %s, which nobody owns", name)
        # Kill all of them first: each takes the kernel a while, mostly waiting.
        kill_group(cgroup_layout().container(name).unified)

    def dismantle_one(name: str) -> str:
        try:
            dismantle(cgroup_layout().container(name), roots / name)
        except HostError as error:
            return error.detail
        return ""

    failures: list[str] = []
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for done, failure in enumerate(pool.map(dismantle_one, doomed), start=1):
            failures += [failure] if failure else []
            on_progress(done, len(doomed))
    if failures:
        raise HostError(" ".join(failures))
