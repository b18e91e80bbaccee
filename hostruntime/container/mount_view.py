"""What a starting container sees of the host's mounts: those that it needs, and no container's.

LXC makes two groups for a container in every cgroup hierarchy that it sees, and half of those of v1
have no limit of ours: those are left out, too.

A container begins with a copy of every mount that its starter has (mount_namespaces(7)), and LXC
reads the list of them.  With three mounts of each container on the host, starting one among a
thousand would take several times as long.  So a launcher has a mount namespace of its own without
any container's mounts, and each start another one, which gets copies of its own from the host's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hostruntime.container.rootfs import FIGURES, RootfsPlan, make_directories
from hostruntime.host import kernel

_NAMESPACE = "/proc/self/ns/mnt"


@dataclass(frozen=True)
class MountView:
    """The mount namespace of a launcher; ``host`` is a descriptor of the agent's."""

    host: int

    @classmethod
    def enter(cls, run_dir: Path, unused: Iterable[Path]) -> MountView:
        """Move this single-threaded process into a namespace without the mounts below ``run_dir``.

        Without those at ``unused``, either.  What changes on the host elsewhere changes here too,
        if its mounts are shared.  Raises OSError.
        """
        host = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
        os.unshare(os.CLONE_NEWNS)
        kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_SLAVE)
        # The outermost first, which takes along what is mounted in it.
        for point in (*reversed(kernel.mount_points_under(run_dir)), *unused):
            try:
                kernel.umount(point, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOENT):
                    raise
        return cls(host)

    def enter_for(self, plan: RootfsPlan, netns: Path | None) -> None:
        """Move this process, a launcher's fork, into a namespace to start a container in.

        Its disk, its volume, its sysfs and its network namespace are mounted there as on the host,
        where the sysfs is not needed any more.  Its figures are mounted there only.  The runtime
        layer is mounted on the host, as that is how it is known to be in use
        (:func:`hostruntime.container.runtime_layer.remove_unused`).  Raises OSError.
        """
        with contextlib.ExitStack() as stack:
            own = os.open(_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, own)
            os.setns(self.host, os.CLONE_NEWNS)
            trees = _copies([plan.writable, plan.volume, plan.sysfs, netns], stack)
            figures = _figures(plan, stack)
            make_directories(plan.mounts, plan.id_base)
            kernel.mount(str(plan.runtime_tree), plan.mounts / "runtime", None, kernel.MS_BIND)
            if plan.sysfs is not None:
                kernel.umount_all(plan.sysfs)
            os.setns(own, os.CLONE_NEWNS)
            os.unshare(os.CLONE_NEWNS)
            for path, tree in trees.items():
                kernel.move_mount(tree, path)
            if figures is not None:
                kernel.move_mount(figures, plan.mounts / FIGURES)


def _figures(plan: RootfsPlan, stack: contextlib.ExitStack) -> int | None:
    if plan.figures is None:
        return None
    tree = kernel.open_tree(plan.figures)
    stack.callback(os.close, tree)
    kernel.mount_setattr(tree, set_flags=kernel.MOUNT_ATTR_RDONLY)
    return tree


def _copies(paths: Iterable[Path | None], stack: contextlib.ExitStack) -> dict[Path, int]:
    """Descriptors of copies of the mounts at these paths, closed with the stack."""
    trees: dict[Path, int] = {}
    for path in paths:
        if path is not None:
            trees[path] = kernel.open_tree(path)
            stack.callback(os.close, trees[path])
    return trees
