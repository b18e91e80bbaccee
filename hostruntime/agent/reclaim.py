"""The cleanup at start, and the removal of a whole instance.

A killed agent leaves things behind: containers (rightly, if a sandbox owns them), roots mounted
for containers that never started, slots, incomplete trees.  Everything that no running sandbox
owns is removed; the kernel's state takes precedence over records.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.container.disk import Disks
from hostruntime.container.dismantling import dismantle, kill_container
from hostruntime.errors import HostError
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.records import BadRecord
from hostruntime.host.rundir import RunDir
from hostruntime.image.store import ImageStore
from hostruntime.image.trash import Trash
from hostruntime.network.slots import SlotPool
from hostruntime.sandbox.record import attached_volumes, read_sandbox
from hostruntime.sandbox.snapshots import image_users, remove_incomplete
from hostruntime.volume.store import VolumeStore

_log = logging.getLogger(__name__)
# Mostly waiting for the kernel.
_PARALLEL = 16

OnProgress = Callable[[int, int], None]


def reclaim(
    paths: StatePaths, instance: Instance, pool: SlotPool, store: ImageStore
) -> frozenset[str]:
    """Remove what nobody owns; return the sandboxes that are still running.

    The pool must be set up.  Raises HostError or OSError if something cannot be removed.
    """
    remove_incomplete(paths, instance, store.trash)
    candidates = _recorded_as_running(paths, instance)
    running = {owner: name for owner, name in candidates.items() if _is_running(name)}
    live = set(running)
    _dismantle_except(instance, running.values())
    pool.reclaim(live)
    without_slot = {owner for owner in live if pool.slot_of(owner) is None}
    if without_slot:
        # Without its network namespace or its policy a container must not keep running.
        _log.error("stopping %s: the network slot is gone", ", ".join(sorted(without_slot)))
        live -= without_slot
        _dismantle_except(instance, [running[owner] for owner in live])
    _release_disks_except(Disks(paths, instance), live)
    VolumeStore(paths, instance, store.trash).recover(_volumes_of(paths, live))
    store.recover(live | image_users(paths))
    for directory in paths.warm.iterdir():
        store.trash.discard(directory)
    return frozenset(live)


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
    _dismantle_except(instance, (), on_progress)
    cgroup_layout().remove_instance(instance.prefix)
    disks = Disks(paths, instance)
    _release_disks_except(disks, ())
    VolumeStore(paths, instance, trash).recover(())
    for directory in (RunDir.of(instance).roots, RunDir.of(instance).lxc, disks.mounts):
        shutil.rmtree(directory, ignore_errors=True)


def _recorded_as_running(paths: StatePaths, instance: Instance) -> dict[str, str]:
    """The sandboxes that should be running, and the names of their containers."""
    running: dict[str, str] = {}
    for directory in paths.sandboxes.iterdir():
        try:
            sandbox = read_sandbox(directory)
        except BadRecord as error:
            # Its owner, its network policy and its deadline are unknown.
            _log.error("sandbox %s is stopped if it is running: %s", directory.name, error)
            continue
        if sandbox is not None and sandbox.state == "running":
            running[directory.name] = sandbox.container_name(instance)
    return running


def _volumes_of(paths: StatePaths, live: Collection[str]) -> Collection[str]:
    """The volumes of the sandboxes that keep running."""
    records = (read_sandbox(paths.sandboxes / sandbox_id) for sandbox_id in live)
    return attached_volumes(sandbox for sandbox in records if sandbox is not None).keys()


def _is_running(name: str) -> bool:
    return cgroup_layout().container(name).init_pid() is not None


def _dismantle_except(
    instance: Instance, keep: Collection[str], on_progress: OnProgress = lambda done, of: None
) -> None:
    """Dismantle the containers of an instance whose names are not among these."""
    layout, roots = cgroup_layout(), RunDir.of(instance).roots
    names = set(layout.container_names(instance.prefix))
    with contextlib.suppress(FileNotFoundError):
        names |= {path.name for path in roots.iterdir()}
    doomed = sorted(names.difference(keep))
    if doomed:
        _log.info("removing %d containers that nobody owns: %s", len(doomed), " ".join(doomed))
    # Kill all of them first: each takes the kernel a while, mostly waiting.
    for name in doomed:
        kill_container(layout.container(name))
    _for_each(doomed, lambda name: dismantle(layout.container(name), roots / name), on_progress)


def _release_disks_except(disks: Disks, live: Collection[str]) -> None:
    """Release the disks of all but these owners."""
    _for_each(sorted(disks.owners().difference(live)), disks.release)


def _for_each(
    names: Sequence[str],
    action: Callable[[str], object],
    on_progress: OnProgress = lambda done, of: None,
) -> None:
    """Call an action for several names at a time; raises HostError, once all have been tried."""

    def attempt(name: str) -> str:
        try:
            action(name)
        except HostError as error:
            return error.detail
        except OSError as error:
            return f"{name} cannot be removed: {error}."
        return ""

    failures: list[str] = []
    with ThreadPoolExecutor(_PARALLEL) as pool:
        for done, failure in enumerate(pool.map(attempt, names), start=1):
            failures += [failure] if failure else []
            on_progress(done, len(names))
    if failures:
        raise HostError(" ".join(failures))
