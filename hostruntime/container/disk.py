"""A container's own disk: a small ext4 in a sparse file, mounted through a loop device.

What bounds a writable layer must hold on whatever the state directory is on.  Project quotas do
not: ext4 wants them chosen when it is made and a kernel with the quota format, xfs a mount option,
btrfs another mechanism altogether; Debian's defaults have none of them.  A file system of its own
bounds blocks and inodes everywhere, answers ENOSPC to that container alone, is given back by one
``unlink`` however many files a tenant made, and costs 2 ms at start::

    <state dir>/disks/<size>.ext4        an empty one, made once, to copy
    <state dir>/disks/<owner>.img        sparse: takes what was written, at most its size
    /run/orkestr/<n>/disks/<owner>/      where it is mounted, ids as inside (0 = root): for root
                                         alone, at every level

There is no journal and nothing is flushed: a disk does not outlive its container's boot, and an
image is captured from what the page cache says.  Only to save a copy (:meth:`Disks.save`) is it
made read-only for a moment, which leaves a clean file system in the file; where programs go on
having files open (:meth:`Disks.save_open`) it is frozen instead, and the copy is put right.  The
loop device frees itself with the last user of the mount (LO_FLAGS_AUTOCLEAR in loop(4)), so a
killed agent leaves none behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.errors import HostError, HostFault
from hostruntime.host import kernel
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.room import Room
from hostruntime.host.run import run
from hostruntime.host.rundir import RunDir
from hostruntime.image.sparse import clone_or_copy
from hostruntime.image.trees import Check, no_check

MIB = 1024 * 1024
_BLOCK = 4096
_MKFS_SECONDS = 120.0
# Named one by one, so that no machine's mke2fs.conf(5) decides; no journal among them.
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
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878
_FSCK_SECONDS = 300.0
# e2fsck(8): nothing was wrong; what was wrong has been put right.
_FSCK_FINE = frozenset({0, 1})


class DiskStuckError(HostFault):
    """A disk stayed read-only: its container cannot go on."""


@dataclass(frozen=True)
class DiskSize:
    """What a disk takes of the host's, and what is in use of it, what is only in memory included.

    In bytes.  ext4 counts as used what it has promised room to (delayed allocation).
    """

    allocated: int
    used: int

    @property
    def whole(self) -> int:
        """What it takes once everything is written."""
        return max(self.allocated, self.used)

    @property
    def unwritten(self) -> int:
        """What of it the host's disk has not been asked for yet, at most."""
        return self.whole - self.allocated


@dataclass
class Disks:
    """The disks of one installation, by owner.  Everything blocks for some milliseconds."""

    paths: StatePaths
    instance: Instance
    # What the watch of the room has found (hostruntime.agent.room_watch), None while there is
    # enough.
    refusal: Callable[[], HostError] | None = None
    _making: threading.Lock = field(default_factory=threading.Lock)

    @property
    def mounts(self) -> Path:
        """Where disks are mounted."""
        return RunDir.of(self.instance).disks

    def path(self, owner: str) -> Path:
        """Where an owner's disk is mounted, if it has one."""
        return self.mounts / owner

    def attach(self, owner: str, size_mb: int, saved: Path | None = None) -> Path:
        """Give ``owner`` an empty disk of ``size_mb`` MiB, in place of any it has; its path.

        ``saved`` is a disk of that size, made by :meth:`save`, to begin with instead.  Raises
        HostFull, HostUnavailable, HostFault, OSError; then nothing is left.
        """
        self.require_room()
        self.release(owner)
        source = saved or self._empty(size_mb)
        target = self.path(owner)
        try:
            RunDir.of(self.instance).ensure_disks()
            target.mkdir(mode=0o700)
            with _copied(source, self._image(owner)) as image, _loop_device(image) as device:
                kernel.mount(device, target, "ext4", _FLAGS, _OPTIONS)
            # What is mounted has a mode of its own, and hides that of the mount point.
            target.chmod(0o700)
        except BaseException:
            self.release(owner)
            raise
        return target

    def release(self, owner: str) -> None:
        """Unmount and unlink an owner's disk, whatever was written to it; idempotent.

        Raises OSError when it cannot be unmounted.
        """
        target = self.path(owner)
        while target in kernel.mount_points(target):
            _shut_down(target)
            _unmount(target)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        self._image(owner).unlink(missing_ok=True)

    def release_all_but(self, live: Iterable[str]) -> None:
        """What a killed agent left.  Raises OSError."""
        found = {path.stem for path in self.paths.disks.glob("*.img")}
        with contextlib.suppress(FileNotFoundError):
            found |= {path.name for path in self.mounts.iterdir()}
        for owner in sorted(found - set(live)):
            self.release(owner)

    def flush(self, owner: str) -> None:
        """Write to the file what is still in memory, so that :meth:`save` is quick; slow."""
        kernel.syncfs(self.path(owner))

    def save(self, owner: str, target: Path, check: Check = no_check) -> None:
        """Copy an owner's disk to the file ``target``, as it is at one instant.

        Nothing may have a file on it open for writing: that is EBUSY.  What tries to write
        meanwhile fails.  ``target`` is not flushed, and half made when this raises OSError, what
        ``check`` does, or DiskStuckError.
        """
        mounted = self.path(owner)
        kernel.mount("", mounted, None, _FLAGS | kernel.MS_REMOUNT | kernel.MS_RDONLY)
        try:
            with _copied(self._image(owner), target, check):
                pass
        finally:
            _make_writable(mounted)

    def save_open(self, owner: str, target: Path, check: Check = no_check) -> None:
        """As :meth:`save`, though files on it are open for writing; what writes to it waits.

        Nobody may be in the middle of a write who is to be frozen later: freeze processes first.
        The copy is that of a machine whose plug was pulled after everything had been written, to
        be put right by :func:`mend`.  Raises OSError, and what ``check`` does.
        """
        mounted = os.open(self.path(owner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(mounted, _FIFREEZE, 0)
            try:
                with _copied(self._image(owner), target, check):
                    pass
            finally:
                fcntl.ioctl(mounted, _FITHAW, 0)
        finally:
            os.close(mounted)

    def thaw(self, owner: str) -> None:
        """Undo what a killed agent left of :meth:`save_open`; nothing frozen is fine."""
        with contextlib.suppress(OSError):
            mounted = os.open(self.path(owner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(mounted, _FITHAW, 0)
            finally:
                os.close(mounted)

    def allocated(self, owner: str) -> int:
        """How many bytes of an owner's disk a copy would have to take over.  Raises OSError."""
        return max(self.used(owner)[0], self._image(owner).stat().st_blocks * 512)

    def sizes(self) -> dict[str, DiskSize]:
        """What each owner's disk takes of the host's, as far as it is there."""
        found: dict[str, DiskSize] = {}
        for image in self.paths.disks.glob("*.img"):
            owner = image.stem
            with contextlib.suppress(OSError):
                allocated = image.stat().st_blocks * 512
                used = self.used(owner)[0] if self.path(owner).is_mount() else 0
                found[owner] = DiskSize(allocated, used)
        return found

    def used(self, owner: str) -> tuple[int, int]:
        """How many bytes and inodes of an owner's disk are in use.  Raises OSError."""
        found = os.statvfs(self.path(owner))
        used_bytes = (found.f_blocks - found.f_bfree) * found.f_frsize
        return used_bytes, found.f_files - found.f_ffree

    def is_full(self, owner: str) -> bool:
        """Whether an owner's disk has next to no blocks or inodes left; False without a disk."""
        if not self.path(owner).is_mount():
            return False
        found = os.statvfs(self.path(owner))
        return found.f_bavail < found.f_blocks // 200 or found.f_favail < found.f_files // 200

    def _image(self, owner: str) -> Path:
        return self.paths.disks / f"{owner}.img"

    def require_room(self, size_bytes: int = 0) -> None:
        """Raise HostFull when so much would be of what nothing new may take.

        HostUnavailable when nothing can be written at all.  Raises OSError.
        """
        if self.refusal is not None:
            raise self.refusal()
        Room.of(self.paths.root).require(size_bytes)

    def _empty(self, size_mb: int) -> Path:
        """An empty file system of this size, made the first time."""
        path = self.paths.disks / f"{size_mb}.ext4"
        with self._making:
            if not path.exists():
                _make(path, size_mb)
        return path


def mend(saved: Path) -> None:
    """Make a clean file system of what :meth:`Disks.save_open` copied.

    There is no journal: files that were deleted while open are in the way.  Raises HostFault.
    """
    done = run(["e2fsck", "-f", "-p", str(saved)], timeout=_FSCK_SECONDS, check=False)
    if done.returncode not in _FSCK_FINE:
        raise HostFault(f"{saved} cannot be put right: {done.text.strip()[-500:]}")


def mount_nameless(directory: Path, target: Path, size_mb: int) -> None:
    """Mount an empty disk, made as all are, at ``target``: it is gone with the mount.

    Its file is on the file system of ``directory`` and in no directory (O_TMPFILE in open(2)).
    Raises HostFault, OSError.
    """
    image = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(image, size_mb * MIB)
        name = f"/proc/{os.getpid()}/fd/{image}"
        run([*_MKE2FS, "-O", _FEATURES, "-E", _EXTENDED, name], timeout=_MKFS_SECONDS)
        with _loop_device(image) as device:
            kernel.mount(device, target, "ext4", _FLAGS, _OPTIONS)
    finally:
        os.close(image)


def _make(path: Path, size_mb: int) -> None:
    """mke2fs(8), into place when it is whole."""
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
def _copied(source: Path, target: Path, check: Check = no_check) -> Iterator[int]:
    """A descriptor of a copy, as sparse as the original (SEEK_DATA in lseek(2))."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with source.open("rb") as original:
        descriptor = os.open(target, flags, 0o600)
        try:
            clone_or_copy(original.fileno(), descriptor, check)
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _loop_device(image: int) -> Iterator[str]:
    """A loop device on ``image``, to be mounted before this ends.  Raises HostFault, OSError."""
    with contextlib.ExitStack() as opened:
        yield f"/dev/loop{_configured(image, opened)}"


def _configured(image: int, opened: contextlib.ExitStack) -> int:
    control = _device("/dev/loop-control", opened)
    while True:
        number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        device = _device(f"/dev/loop{number}", opened)
        flags = _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
        info = _LOOP_INFO.pack(0, 0, 0, 0, 0, number, 0, 0, flags, b"", b"", b"", 0, 0)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(image, _BLOCK, info))
        except OSError as error:
            if error.errno != errno.EBUSY:  # Somebody else was quicker to take this one.
                raise
        else:
            return number


def _device(path: str, opened: contextlib.ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HostFault(
            f"{path} cannot be opened ({error.strerror}): sandboxes get their disk through loop "
            "devices. Run `modprobe loop` as root."
        ) from error
    opened.callback(os.close, descriptor)
    return descriptor


def _shut_down(target: Path) -> None:
    """Let nothing of what was written reach the disk any more: it is about to be deleted."""
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


def _unmount(target: Path) -> None:
    try:
        kernel.umount(target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        kernel.umount(target, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
