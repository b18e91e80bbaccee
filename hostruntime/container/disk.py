"""A container's own disk: a small ext4 in a sparse file, mounted through a loop device.

The limit of a writable layer must work on any file system that holds the state directory.  Project
quotas do not: ext4 needs them at mkfs time and a kernel with the quota format, xfs a mount option,
btrfs another mechanism altogether; Debian's defaults have none of them.  A separate file system
limits blocks and inodes everywhere, returns ENOSPC to that container alone, is freed by one
``unlink`` however many files a tenant created, and costs 2 ms at start::

    <state dir>/disks/<size>.ext4        an empty one, created once, to copy
    <state dir>/disks/<owner>.img        sparse: takes what was written, at most its size
    /run/orkestr/<n>/disks/<owner>/      the mount point, ids as inside (0 = root): accessible to
                                         root alone, at every level

There is no journal and nothing is flushed: a disk does not outlive its container's boot, and an
image is captured from the page cache.  Only for saving a copy (:meth:`Disks.save`) is it made
read-only for a moment, which leaves a clean file system in the file; if programs keep files open
(:meth:`Disks.save_frozen`, :meth:`Disks.save_unwritten`), it, or whoever could write to it, is
frozen instead, and the copy is finished (:mod:`hostruntime.container.saved_disk`).  The loop device
is freed with the last user of the mount (LO_FLAGS_AUTOCLEAR in loop(4)), so a killed agent leaves
none behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.container.saved_disk import device_writes, write_out
from hostruntime.errors import HostError, HostFault
from hostruntime.host import kernel
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.run import run
from hostruntime.host.rundir import RunDir
from hostruntime.image.sparse import clone_or_copy
from hostruntime.image.trees import Check, no_check

MIB = 1024 * 1024
_BLOCK = 4096
_MKFS_SECONDS = 120.0
# Listed explicitly, so that mke2fs.conf(5) has no influence; without a journal.
_FEATURES = (
    "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,large_file,"
    "sparse_super,uninit_bg,64bit"
)
_MKE2FS = ("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-i", "16384")
_EXTENDED = "lazy_itable_init=1,nodiscard,root_owner=0:0"
_OPTIONS = "noinit_itable,nobarrier,errors=remount-ro"
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOATIME

# include/uapi/linux/loop.h, include/uapi/linux/fs.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_LOOP_INFO = struct.Struct("<5Q4I64s64s32s2Q")
_LOOP_CONFIG = struct.Struct(f"<2I{_LOOP_INFO.size}s64x")
_FS_IOC_SHUTDOWN = 0x8004587D
_SHUTDOWN_NO_FLUSH = 2
# The contents of a disk that are written sooner than the kernel reports a shutdown of it: an alert,
# which goes to the console (ext4_force_shutdown), and takes as long as the rest of a release.
_QUICKLY_WRITTEN_BYTES = MIB
FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


class DiskStuckError(HostFault):
    """A disk is stuck read-only: its container cannot continue."""


@dataclass(frozen=True)
class DiskSize:
    """The host's blocks that a disk occupies, and its used blocks, including unwritten ones.

    In bytes.  ext4 counts blocks reserved by delayed allocation as used.
    """

    allocated: int
    used: int

    @property
    def when_written(self) -> int:
        """The space it occupies once everything is written."""
        return max(self.allocated, self.used)

    def __add__(self, other: DiskSize) -> DiskSize:
        return DiskSize(self.allocated + other.allocated, self.used + other.used)

    @property
    def unwritten(self) -> int:
        """The upper bound of what has not been allocated on the host's disk yet."""
        return self.when_written - self.allocated


@dataclass
class Disks:
    """The disks of one installation, by owner.  Every method blocks for some milliseconds."""

    paths: StatePaths
    instance: Instance
    # Set by hostruntime.agent.disk_monitor while disk space is short, else None.
    refusal: Callable[[], HostError] | None = None
    # Deletes a disk's file, whose space may be freed later: that is slow where the host's file
    # system tells its device of each piece at once (the discard option in ext4(5)).
    delete: Callable[[Path], None] = Path.unlink
    _create_lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def mounts(self) -> Path:
        """The directory where disks are mounted."""
        return RunDir.of(self.instance).disks

    def path(self, owner: str) -> Path:
        """The mount point of an owner's disk, whether it exists or not."""
        return self.mounts / owner

    def attach(self, owner: str, size_mb: int, saved: Path | None = None) -> Path:
        """Mount an empty disk of ``size_mb`` MiB for ``owner``, replacing any; return its path.

        ``saved`` is a disk of that size, created by :meth:`save`, to start from instead.  Raises
        HostFull, HostUnavailable, HostFault, OSError; then nothing is left behind.
        """
        self.require_space()
        self.release(owner)
        source = saved or self._empty_disk(size_mb)
        target = self.path(owner)
        try:
            RunDir.of(self.instance).ensure_disks()
            target.mkdir(mode=0o700)
            with _copy_of(source, self._image(owner)) as image, loop_device(image) as device:
                kernel.mount(device, target, "ext4", _FLAGS, _OPTIONS)
            # The mounted root has its own mode, which hides the mount point's.
            target.chmod(0o700)
        except BaseException:
            self.release(owner)
            raise
        return target

    def release(self, owner: str) -> None:
        """Unmount and delete an owner's disk with its contents; idempotent.

        Raises OSError if it cannot be unmounted.
        """
        target = self.path(owner)
        while is_mounted(target):
            if self.used(owner)[0] > _QUICKLY_WRITTEN_BYTES:
                _discard_writes(target)
            unmount(target)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        image = self._image(owner)
        # While space is short, at once: whoever waits for it would else end the next sandbox, too.
        if self.refusal is None:
            # The host's disk may be too full for anything but unlinking.
            with contextlib.suppress(OSError):
                self.delete(image)
        image.unlink(missing_ok=True)

    def rename(self, owner: str, new_owner: str) -> None:
        """Make an owner's mounted disk that of another owner, which has none.

        Raises OSError; then either may have a part of it, and both must be released.
        """
        source, target = self.path(owner), self.path(new_owner)
        target.mkdir(mode=0o700)
        # A mount below a shared one, as /run is on most machines, cannot be moved (mount(2)).
        tree = kernel.open_tree(source)
        try:
            kernel.move_mount(tree, target)
        finally:
            os.close(tree)
        unmount(source)
        source.rmdir()
        self._image(owner).rename(self._image(new_owner))

    def owners(self) -> set[str]:
        """Everybody who has a disk, or whose disk a killed agent has left behind."""
        owners = {path.stem for path in self.paths.disks.glob("*.img")}
        with contextlib.suppress(FileNotFoundError):
            owners |= {path.name for path in self.mounts.iterdir()}
        return owners

    def flush(self, owner: str) -> None:
        """Write cached data to the file, so that :meth:`save` is quick; may be slow."""
        kernel.syncfs(self.path(owner))

    def save(self, owner: str, target: Path, check: Check = no_check) -> None:
        """Copy an owner's disk to the file ``target``, as of one instant.

        No file on it may be open for writing (EBUSY).  Writes during the copy fail.  ``target`` is
        not flushed, and is incomplete if this raises OSError, DiskStuckError or what ``check``
        raises.
        """
        mounted = self.path(owner)
        kernel.mount("", mounted, None, _FLAGS | kernel.MS_REMOUNT | kernel.MS_RDONLY)
        try:
            with _copy_of(self._image(owner), target, check):
                pass
        finally:
            _make_writable(mounted)

    def save_unwritten(self, owner: str, target: Path, check: Check = no_check) -> bool:
        """Like :meth:`save_frozen`, for a disk that nobody can write to during the copy.

        That is so while every process that could is frozen. A freeze of the file system as well
        would take 30 ms: it waits until three sets of other processors' readers have ended
        (percpu_down_write in freeze_super of fs/super.c).  Returns whether nothing was written
        indeed: a frozen process can still be killed for want of memory, and what it had open
        then changes.
        """
        mounted = self.path(owner)
        before = write_out(mounted)
        with _copy_of(self._image(owner), target, check):
            pass
        return before is not None and device_writes(mounted) == before

    def save_frozen(self, owner: str, target: Path, check: Check = no_check) -> bool:
        """Like :meth:`save`, but files may be open for writing; writes wait during the copy.

        Freeze processes first: a process that is blocked in a write cannot be frozen later.  The
        copy is like the disk of a machine that lost power after all data had been written; finish
        it with :func:`hostruntime.container.saved_disk.finish`.  Returns True: nothing was written
        meanwhile.  Raises OSError, and what ``check`` raises.
        """
        mounted = os.open(self.path(owner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(mounted, FIFREEZE, 0)
            try:
                with _copy_of(self._image(owner), target, check):
                    return True
            finally:
                fcntl.ioctl(mounted, FITHAW, 0)
        finally:
            os.close(mounted)

    def thaw(self, owner: str) -> None:
        """Thaw a disk that a killed agent left frozen by :meth:`save_frozen`, if it is."""
        with contextlib.suppress(OSError):
            mounted = os.open(self.path(owner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(mounted, FITHAW, 0)
            finally:
                os.close(mounted)

    def allocated(self, owner: str) -> int:
        """The number of bytes that a copy of an owner's disk must transfer.  Raises OSError."""
        return max(self.used(owner)[0], self._image(owner).stat().st_blocks * 512)

    def sizes(self) -> dict[str, DiskSize]:
        """The sizes of all existing disks, by owner."""
        sizes: dict[str, DiskSize] = {}
        for image in self.paths.disks.glob("*.img"):
            owner = image.stem
            with contextlib.suppress(OSError):
                allocated = image.stat().st_blocks * 512
                used = self.used(owner)[0] if self.path(owner).is_mount() else 0
                sizes[owner] = DiskSize(allocated, used)
        return sizes

    def used(self, owner: str) -> tuple[int, int]:
        """How many bytes and inodes of an owner's disk are in use.  Raises OSError."""
        stat = os.statvfs(self.path(owner))
        used_bytes = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        return used_bytes, stat.f_files - stat.f_ffree

    def is_full(self, owner: str) -> bool:
        """Whether an owner's disk has almost no blocks or inodes left; False without a disk."""
        if not self.path(owner).is_mount():
            return False
        stat = os.statvfs(self.path(owner))
        return stat.f_bavail < stat.f_blocks // 200 or stat.f_favail < stat.f_files // 200

    def _image(self, owner: str) -> Path:
        return self.paths.disks / f"{owner}.img"

    def require_space(self, size_bytes: int = 0) -> None:
        """Raise HostFull if ``size_bytes`` more would use the reserve.

        Raises HostUnavailable if nothing can be written at all, OSError.
        """
        if self.refusal is not None:
            raise self.refusal()
        DiskSpace.of(self.paths.root).require(size_bytes)

    def _empty_disk(self, size_mb: int) -> Path:
        """An empty file system of this size, created on first use."""
        path = self.paths.disks / f"{size_mb}.ext4"
        with self._create_lock:
            if not path.exists():
                _create_filesystem(path, size_mb)
        return path


def mount_anonymous(directory: Path, target: Path, size_mb: int) -> None:
    """Mount an empty disk at ``target``, created like all disks, that vanishes when unmounted.

    Its file is on the file system of ``directory`` but unnamed (O_TMPFILE in open(2)).  Raises
    HostFault, OSError.
    """
    image = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(image, size_mb * MIB)
        name = f"/proc/{os.getpid()}/fd/{image}"
        run([*_MKE2FS, "-O", _FEATURES, "-E", _EXTENDED, name], timeout=_MKFS_SECONDS)
        with loop_device(image) as device:
            kernel.mount(device, target, "ext4", _FLAGS, _OPTIONS)
    finally:
        os.close(image)


def _create_filesystem(path: Path, size_mb: int) -> None:
    """Run mke2fs(8), and rename the result into place when it is complete."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    with temporary.open("wb") as file:
        file.truncate(size_mb * MIB)
    run(
        [*_MKE2FS, "-O", _FEATURES, "-E", _EXTENDED, str(temporary)],
        timeout=_MKFS_SECONDS,
    )
    temporary.rename(path)


@contextmanager
def _copy_of(source: Path, target: Path, check: Check = no_check) -> Iterator[int]:
    """Copy a file and yield a descriptor; as sparse as the original (SEEK_DATA in lseek(2))."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with source.open("rb") as original:
        descriptor = os.open(target, flags, 0o600)
        try:
            clone_or_copy(original.fileno(), descriptor, check)
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def loop_device(image: int) -> Iterator[str]:
    """A loop device on ``image``, to be mounted within the block.  Raises HostFault, OSError."""
    with contextlib.ExitStack() as stack:
        yield f"/dev/loop{_configureloop_device(image, stack)}"


def _configureloop_device(image: int, stack: contextlib.ExitStack) -> int:
    control = _open_device("/dev/loop-control", stack)
    while True:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        device = _open_device(f"/dev/loop{number}", stack)
        flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
        info = _LOOP_INFO.pack(0, 0, 0, 0, 0, number, 0, 0, flags, b"", b"", b"", 0, 0)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(image, _BLOCK, info))
        except OSError as error:
            if error.errno != errno.EBUSY:  # Another process claimed this one first.
                raise
        else:
            return number


def _open_device(path: str, stack: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostFault(
            f"{path} cannot be opened ({error.strerror}): sandboxes get their disk through loop "
            "devices. Run `modprobe loop` as root."
        ) from error
    stack.callback(os.close, descriptor)
    return descriptor


def is_mounted(target: Path) -> bool:
    """Whether a disk is mounted at ``target``, which then is on another device than its parent."""
    try:
        return target.lstat().st_dev != target.parent.lstat().st_dev
    except FileNotFoundError:
        return False


def _discard_writes(target: Path) -> None:
    """Discard unwritten data, as the disk is about to be deleted."""
    with contextlib.suppress(OSError):
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", _SHUTDOWN_NO_FLUSH))
        finally:
            os.close(descriptor)


def _make_writable(mounted: Path) -> None:
    try:
        kernel.mount("", mounted, None, _FLAGS | kernel.MS_REMOUNT)
    except OSError as error:
        raise DiskStuckError(
            f"{mounted} could not be made writable again: {error.strerror}."
        ) from error


def unmount(target: Path) -> None:
    """Unmount; at once from here if it is in use, and for whoever uses it later."""
    try:
        kernel.umount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        kernel.umount(target, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
