"""The end of a container: its processes, control groups and mounts."""

from __future__ import annotations

import logging
import os
import select
import signal
import time
from pathlib import Path

from hostruntime.container.cgroups import (
    ContainerGroups,
    freeze_group,
    kill_group,
    pids_in,
    pids_under,
    signal_group,
)
from hostruntime.container.rootfs import unmount_rootfs
from hostruntime.errors import HostFault
from hostruntime.host.patience import Patience, scaled

_MONITOR_GRACE_SECONDS = 5.0
_GROUP_REMOVAL_SECONDS = 2.0
_STRAYS_GRACE_SECONDS = 5.0
_log = logging.getLogger(__name__)


def dismantle(groups: ContainerGroups, mount_dir: Path) -> None:
    """Kill a container's processes, remove its control groups, unmount its root; idempotent.

    For one that no launcher has anything to do with.  Blocks for up to some seconds, until the
    processes have died.  Raises HostFault if processes or mounts cannot be removed.
    """
    end_processes(groups)
    remove_remains(groups, mount_dir)


def end_processes(groups: ContainerGroups) -> None:
    """Kill a container's processes and wait until they have died, for up to some seconds."""
    monitors = pids_in(groups.monitor)
    kill_container(groups)
    for pid in monitors:
        _wait_for_exit(pid, _MONITOR_GRACE_SECONDS)


def remove_remains(groups: ContainerGroups, mount_dir: Path) -> None:
    """Remove the control groups of a container that has exited, and unmount its root; idempotent.

    Raises HostFault if something cannot be unmounted.
    """
    if not groups.remove(scaled(_GROUP_REMOVAL_SECONDS)):
        _log.warning(
            "control groups of %s are still busy; the next start removes them", groups.name
        )
    try:
        unmount_rootfs(mount_dir)
    except OSError as error:
        raise HostFault(f"{error.filename} cannot be unmounted: {error.strerror}.") from error


def kill_container(groups: ContainerGroups) -> None:
    """Kill everything in a container, and its LXC monitor.

    The monitor would only remove the groups, which is done anyway; a thousand of them that do it at
    once take longer than everything else.
    """
    kill_group(groups.unified)
    kill_group(groups.monitor)


def kill_all_but_init(groups: ContainerGroups, init_pid: int) -> None:
    """Kill everything except init, while frozen so that nothing can escape by forking."""
    keep = frozenset({init_pid})
    if not set(pids_under(groups.unified)) - keep:
        return
    freeze_group(groups.unified, frozen=True)
    try:
        signal_group(groups.unified, signal.SIGKILL, keep)
    finally:
        freeze_group(groups.unified, frozen=False)
    patience = Patience(_STRAYS_GRACE_SECONDS, lambda: set(pids_under(groups.unified)) - keep)
    while set(pids_under(groups.unified)) - keep and not patience.exhausted():
        signal_group(groups.unified, signal.SIGKILL, keep)
        time.sleep(0.005)


def _wait_for_exit(pid: int, seconds: float) -> bool:
    """Wait for a process that is not our child; False if it stalls without exiting."""
    pidfd = open_pidfd(pid)
    if pidfd is None:
        return True
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        patience = Patience(seconds, lambda: [pid])
        while not patience.exhausted():
            if poller.poll(patience.poll_interval * 1000):
                return True
        return False
    finally:
        os.close(pidfd)


def open_pidfd(pid: int) -> int | None:
    """A descriptor of a process (pidfd_open(2)); None if it has exited."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
