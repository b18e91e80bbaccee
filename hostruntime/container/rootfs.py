"""A container's root file system: overlayfs over idmapped mounts.

On disk every id is the one inside the container (root = 0), so that containers with different host
ids can share image trees.  Three idmapped bind mounts shift ids into the container's range, and
the overlay is mounted over those, in the initial user namespace: an overlay mounted by the
container itself would make dpkg fail with EXDEV (redirect_dir is off for unprivileged mounts,
Documentation/filesystems/overlayfs.rst).

All of this is mounted in a mount namespace that only the starting container has
(:mod:`hostruntime.container.mount_view`), and disappears with its last process.

The mount points are under ``/run/orkestr/<instance>/roots/<container name>/`` rather than in the
state directory: LXC's child enters the root as the container's root user, which must not be able
to enter the state directory (or the home directory that may contain it), but can traverse these
(:mod:`hostruntime.host.rundir`).  Each is owned by the container's root and closed to everybody
else::

    roots/<name>/image      the image, read-only     roots/<name>/runtime   the runtime layer
    roots/<name>/rw         the container's disk, holding upper/ and work/
    roots/<name>/dev        its own device nodes
    roots/<name>/figures    what it is told of its size, read-only
    roots/<name>/merged     the container's root, with the slot's sysfs on /sys, and on /persist
                            its volume if it has one, idmapped like its disk
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from hostruntime.host import kernel
from hostruntime.host.ids import HIGH_IDS, IDS_PER_SLOT

# The writable layer is on a separate file system: without xino, files of the image would have a
# different device number than their directories, and look like mount points.
_OPTIONS = "redirect_dir=on,index=off,metacopy=off,xino=on"


# The devices that LXC gives a container, with the numbers of the kernel's devices.txt.  LXC would
# bind the host's: shared inodes, whose locks and events would connect all containers.
DEVICES = {
    **{"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)},
    "tty": (5, 0),
}
# Where a volume is mounted, from the root.
PERSIST = "persist"
# Where what a container is told of its size is mounted, in ``roots/<name>``.
FIGURES = "figures"
# What is under the overlay, the topmost first.
_LAYERS = ("rw", "runtime", "image")
_DEVICE_OPTIONS = "mode=711,size=4k,nr_inodes=16"


@dataclass(frozen=True)
class RootfsPlan:
    """What to mount where.  ``mounts`` is ``roots/<name>``; ``writable`` holds upper and work."""

    mounts: Path
    image_tree: Path
    runtime_tree: Path
    writable: Path
    sysfs: Path | None
    id_base: int
    volume: Path | None = None
    figures: Path | None = None

    @property
    def merged(self) -> Path:
        """The container's root."""
        return self.mounts / "merged"


def id_extents(id_base: int) -> list[tuple[int, int, int]]:
    """The (inside, outside, count) extents of the user namespace that idmaps a slot's mounts.

    The last one maps the mounter's own id 0: overlayfs creates its work files as root, which an
    idmapped mount would otherwise refuse, and the overlay would be read-only.
    """
    next_id = HIGH_IDS[0] + HIGH_IDS[2]
    return [*container_extents(id_base), (next_id, 0, 1)]


def container_extents(id_base: int) -> list[tuple[int, int, int]]:
    """The (inside, outside, count) extents of the user namespace that a container runs in."""
    return [(0, id_base, IDS_PER_SLOT), HIGH_IDS]


def mount_rootfs(plan: RootfsPlan, userns_fd: int) -> Path:
    """Mount a container's root and return it; on failure nothing stays mounted.

    ``userns_fd`` is a user namespace with :func:`id_extents`.  Raises OSError.
    """
    make_directories(plan.mounts, plan.id_base)
    _make_layers(plan)
    try:
        kernel.bind_idmapped(plan.image_tree, plan.mounts / "image", userns_fd, read_only=True)
        kernel.bind_idmapped(plan.runtime_tree, plan.mounts / "runtime", userns_fd, read_only=True)
        kernel.bind_idmapped(plan.writable, plan.mounts / "rw", userns_fd)
        _mount_overlay(plan)
        _make_devices(plan.mounts / "dev")
        if plan.sysfs is not None:
            _bind_sysfs(plan.sysfs, plan.merged)
        if plan.volume is not None:
            _bind_volume(plan.volume, plan.merged, userns_fd)
    except BaseException:
        unmount_rootfs(plan.mounts)
        raise
    return plan.merged


def unmount_rootfs(mounts: Path) -> None:
    """Unmount whatever is mounted below ``roots/<name>`` and remove it; idempotent.

    Raises OSError if something cannot be unmounted.
    """
    # All that the host itself has of a container's (MountView.enter_for).
    kernel.umount_all(mounts / "runtime")
    if _try_to_remove(mounts):
        return
    # A start has failed.
    for name in ("merged/persist", "merged/sys", "merged", "dev", FIGURES, *_LAYERS):
        kernel.umount_all(mounts / name)
    if _try_to_remove(mounts):
        return
    # A killed start left something that these names do not cover.
    for point in kernel.mount_points_under(mounts):
        kernel.umount(point, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
    _remove_directories(mounts)


def _try_to_remove(mounts: Path) -> bool:
    """Remove the directories; False if something is mounted or else left in there."""
    try:
        _remove_directories(mounts)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _remove_directories(mounts: Path) -> None:
    for name in ("merged", "dev", FIGURES, *_LAYERS, "."):
        with contextlib.suppress(FileNotFoundError):
            (mounts / name).rmdir()


def make_directories(mounts: Path, id_base: int) -> None:
    """Create ``roots/<name>`` for a slot's ids, with the mount points in it; idempotent."""
    mounts.mkdir(mode=0o700, exist_ok=True)
    os.chown(mounts, id_base, id_base)
    for name in ("image", "runtime", "rw", "dev", FIGURES, "merged"):
        (mounts / name).mkdir(mode=0o755, exist_ok=True)


def _make_layers(plan: RootfsPlan) -> None:
    plan.writable.mkdir(mode=0o755, exist_ok=True)
    (plan.writable / "upper").mkdir(mode=0o755, exist_ok=True)
    if plan.volume is not None:
        _make_mount_point(plan.writable / "upper" / PERSIST)
    # A volatile overlay marks its work directory, and refuses to mount if the mark exists.
    shutil.rmtree(plan.writable / "work", ignore_errors=True)
    (plan.writable / "work").mkdir(mode=0o700)


def _mount_overlay(plan: RootfsPlan) -> None:
    # Relative, as the container can read these options in its mountinfo (proc(5)).
    layers = "lowerdir=runtime:image,upperdir=rw/upper,workdir=rw/work"
    with contextlib.chdir(plan.mounts):
        try:
            # No fsync inside reaches the disk (Linux 5.10): a capture flushes once, at its end.
            _overlay(plan.merged, f"{layers},{_OPTIONS},volatile")
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            _overlay(plan.merged, f"{layers},{_OPTIONS}")


def _overlay(target: Path, options: str) -> None:
    kernel.mount("overlay", target, "overlay", kernel.MS_NODEV, options)


def _make_devices(directory: Path) -> None:
    kernel.mount(
        "devices", directory, "tmpfs", kernel.MS_NOSUID | kernel.MS_NOEXEC, _DEVICE_OPTIONS
    )
    for name, numbers in DEVICES.items():
        os.mknod(directory / name, stat.S_IFCHR, os.makedev(*numbers))
        # Not by mknod's mode, which the umask reduces.
        (directory / name).chmod(0o666)


def _make_mount_point(path: Path) -> None:
    """A directory in a writable layer, over whatever the image has there.

    In the layer itself, where a snapshot may have a file, a link or a whiteout instead.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(path.lstat().st_mode):
            path.unlink()
    path.mkdir(mode=0o755, exist_ok=True)


def _bind_volume(source: Path, merged: Path, userns_fd: int) -> None:
    flags = kernel.MOUNT_ATTR_IDMAP | kernel.MOUNT_ATTR_NOSUID | kernel.MOUNT_ATTR_NODEV
    _bind_onto(source, merged, PERSIST, flags, userns_fd)


def _bind_sysfs(source: Path, merged: Path) -> None:
    flags = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
    flags |= kernel.MOUNT_ATTR_NODEV | kernel.MOUNT_ATTR_NOEXEC
    _bind_onto(source, merged, "sys", flags)


def _bind_onto(source: Path, merged: Path, name: str, flags: int, userns_fd: int = 0) -> None:
    """Bind a mount onto a directory in a container's root."""
    with contextlib.ExitStack() as stack:
        root = os.open(merged, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, root)
        # What an image has there may be anything, such as a link out of it: never follow it.
        resolve = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_BENEATH
        target = kernel.openat2(name, os.O_PATH | os.O_DIRECTORY, dir_fd=root, resolve=resolve)
        stack.callback(os.close, target)
        tree = kernel.open_tree(source)
        stack.callback(os.close, tree)
        kernel.mount_setattr(tree, set_flags=flags, userns_fd=userns_fd)
        kernel.move_mount_onto(tree, target)
