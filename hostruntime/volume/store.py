"""The files of volumes: each an ext4 with a journal in a sparse file, mounted while in use.

::

    <state dir>/volumes/<id>.ext4       a volume; its size is the file's
    <state dir>/volumes/.<id>.new       one whose first sandbox has never run yet
    <state dir>/volumes/.<id>.copy      a copy as of one instant, for a backup to take away
    /run/orkestr/<n>/volumes/<id>/      the mount point while a sandbox has it, ids as inside

A container's own disk (:mod:`hostruntime.container.disk`) is made for its boot alone; what is on a
volume has to survive the end of the sandbox, of any process of ours, and of the machine's power.
So it has a journal, its writes are flushed in order (barriers, which the loop device passes on as
fsync(2) of the file), and whatever was interrupted is put right by e2fsck(8) before the next mount.

**One device at a time.**  Two devices on one file would destroy the file system.  A lock (flock(2))
on the open file is what prevents that, and not a record: the loop device holds the same open file
for as long as anybody has the file system mounted, in any namespace.  After a detach that may be
somebody who knows nothing of it, such as an operator's shell whose working directory is there.
(Copies in mount namespaces that nobody uses end with the mount point's directory.)  Then the same
device is mounted again, which is the same file system to the kernel.

**Nothing is replaced.**  Only a volume that the caller calls new is created, and it gets its name
once its sandbox runs; without one, the next agent removes it.  Nothing else deletes a volume but
:meth:`VolumeStore.delete`.

A tenant's root writes through the mounted file system alone, never to its blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostruntime.container.disk import (
    FIFREEZE,
    FITHAW,
    MIB,
    DiskSize,
    is_mounted,
    loop_device,
    unmount,
)
from hostruntime.errors import (
    HostError,
    HostFault,
    InvalidRequest,
    VolumeDamaged,
    VolumeInUse,
    VolumeMissing,
)
from hostruntime.host import kernel
from hostruntime.host.disk_space import DiskSpace
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.host.run import run
from hostruntime.host.rundir import RunDir, ensure_directory
from hostruntime.host.tasks import log_errors
from hostruntime.image.sparse import clone_or_copy
from hostruntime.image.trash import Trash
from hostruntime.image.trees import Check, no_check
from hostruntime.wire.volumes import AttachVolume

_LOCK_SECONDS, _POLL_SECONDS = 2.0, 0.01
_MKFS_SECONDS, _FSCK_SECONDS = 120.0, 540.0
# Listed explicitly, so that mke2fs.conf(5) has no influence.
_FEATURES = (
    "none,has_journal,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,"
    "large_file,sparse_super,metadata_csum,64bit"
)
_EXTENDED = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"
# A small volume is not to be all journal.
_SMALL_MB, _SMALL_JOURNAL_MB, _JOURNAL_MB = 1024, 8, 32
# With discard, the space of deleted files returns to the host.
_OPTIONS = "noinit_itable,discard,errors=remount-ro"
_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOATIME
# Like /workspace: for every user inside.
_ROOT_MODE = 0o1777
# e2fsck(8): no errors; errors corrected.
_FSCK_SUCCESS = frozenset({0, 1})
# What it exits with has these bits alone if it got to an end: errors corrected, reboot wanted,
# errors left.  Others tell that it did not (no memory, an I/O error, killed), which is a negative
# number here.
_FSCK_FOUND = 1 | 2 | 4
# s_magic of the superblock ("Data Structures and Algorithms" in the kernel's
# Documentation/filesystems/ext4).
_MAGIC_OFFSET, _MAGIC = 1024 + 0x38, b"\x53\xef"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)
_log = logging.getLogger(__name__)

_IN_USE = "The volume is still in use by a sandbox; try again when that has ended."
_DAMAGED = (
    "The volume's file system is damaged, and could not be repaired without a decision. Nothing of "
    "it was changed: ask your operator to check it, or to restore it from a backup."
)
_UNCHECKED = (
    "The volume's file system could not be checked, and nothing of it was changed. Try again; if "
    "it keeps failing, tell your operator."
)

Ids = list[str]


@dataclass
class VolumeStore:
    """The volumes of one installation.  Every method blocks, for a check even for minutes."""

    paths: StatePaths
    instance: Instance
    trash: Trash

    def mount_point(self, volume_id: str) -> Path:
        """Where a volume is mounted while it is attached."""
        return self._mounts / volume_id

    # Use -----------------------------------------------------------------------------------

    def attach(self, request: AttachVolume) -> None:
        """Mount a volume at its mount point, and create it first if it is new.

        Raises InvalidRequest, VolumeMissing, VolumeInUse, VolumeDamaged, HostError, OSError; then
        nothing is mounted.
        """
        if _ID.fullmatch(request.id) is None:
            raise InvalidRequest(f"{request.id[:80]!r} is not a volume id.")
        image = self._image(request.id)
        if not image.exists():
            if not request.new:
                raise VolumeMissing("The host does not have the volume's data any more.")
            image = self._unfinished(request.id)
            self._create(image, request)
        try:
            self._attach(request.id, image)
        except BaseException:
            self.discard_unfinished(request.id)
            raise

    def _attach(self, volume_id: str, image: Path) -> None:
        until = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                with locked(image) as descriptor:
                    _repair(image)
                    self._mount(volume_id, descriptor)
            except VolumeInUse:
                # A device manager may look at the device of the last use for a moment (udev(7)).
                if self._mount_again(volume_id, image):
                    return
                if time.monotonic() >= until:
                    raise
                time.sleep(_POLL_SECONDS)
            else:
                return

    def _mount_again(self, volume_id: str, image: Path) -> bool:
        """Mount the device that somebody still has mounted; whether there was one."""
        device = _device_of(image)
        if device is None:
            return False
        target = self._make_mount_point(volume_id)
        with contextlib.suppress(OSError):
            kernel.mount(f"/dev/{device}", target, "ext4", _FLAGS, _OPTIONS)
            # It may have been given up, and have become another file's, just before.
            if _has_file(Path(f"/sys/block/{device}"), image):
                return True
            unmount(target)
        with contextlib.suppress(OSError):
            target.rmdir()
        return False

    def keep(self, volume_id: str) -> None:
        """A new volume's sandbox runs: it is a volume from now on; idempotent.  Raises OSError."""
        unfinished = self._unfinished(volume_id)
        if unfinished.exists():
            kernel.syncfs(self.mount_point(volume_id))
            kernel.fsync(unfinished)
            unfinished.rename(self._image(volume_id))
            kernel.fsync(self.paths.volumes)

    def detach(self, volume_id: str) -> None:
        """Write everything, and unmount; idempotent.  Raises OSError if it cannot be unmounted."""
        target = self.mount_point(volume_id)
        while is_mounted(target):
            with contextlib.suppress(OSError):
                # An error of the disk; the journal has what could be written.
                kernel.syncfs(target)
            unmount(target)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        with contextlib.suppress(FileNotFoundError):
            kernel.fsync(self._image(volume_id))

    def discard_unfinished(self, volume_id: str) -> None:
        """Remove a new volume whose sandbox has never run; idempotent.  Raises OSError."""
        self._unfinished(volume_id).unlink(missing_ok=True)

    def delete(self, volume_id: str) -> None:
        """Delete a volume that no sandbox has, with all that is on it; idempotent.

        Raises OSError.
        """
        if _ID.fullmatch(volume_id) is None:
            return
        image = self._image(volume_id)
        # Of a backup that died, or did not wait for it.
        self._copy_of(volume_id).unlink(missing_ok=True)
        if image.exists():
            _log.warning("volume %s is deleted", volume_id)
            self.trash.discard(image)
            kernel.fsync(self.paths.volumes)

    def recover(self, attached: Collection[str]) -> None:
        """Unmount what a killed agent left, but these; thaw those; remove what never was a volume.

        One that cannot be unmounted stays mounted: its next sandbox gets the same device.  Raises
        OSError.
        """
        points = sorted(self._mounts.iterdir()) if self._mounts.exists() else []
        # All of them first: whoever writes to one waits until it is thawed.
        for point in points:
            _thaw(point)
        for point in points:
            if point.name not in attached:
                with log_errors(f"volume {point.name} could not be unmounted"):
                    self.detach(point.name)
        for copy in self.paths.volumes.glob(".*.copy"):
            copy.unlink()
        for unfinished in self.paths.volumes.glob(".*.new"):
            volume_id = unfinished.name.removeprefix(".").removesuffix(".new")
            if volume_id in attached:
                self.keep(volume_id)
            else:
                self.discard_unfinished(volume_id)

    # Backups -------------------------------------------------------------------------------

    def copy(self, volume_id: str, check: Check = no_check) -> Path:
        """Make a copy of a volume as of one instant, and return its file, which is the caller's.

        If a sandbox has the volume, its writes to it wait meanwhile.  Raises VolumeMissing,
        HostFull, OSError, and what ``check`` does; then there is none.
        """
        image, copy = self._image(volume_id), self._copy_of(volume_id)
        if _ID.fullmatch(volume_id) is None or not image.exists():
            raise VolumeMissing("The host does not have the volume's data any more.")
        DiskSpace.of(self.paths.root).require(image.stat().st_blocks * 512)
        copy.unlink(missing_ok=True)
        target = self.mount_point(volume_id)
        try:
            with _frozen(target) if is_mounted(target) else contextlib.nullcontext():
                copy_sparse(image, copy, check)
            kernel.fsync(copy)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
        return copy

    # What there is -------------------------------------------------------------------------

    def ids(self) -> Ids:
        """All volumes."""
        return sorted(path.stem for path in self.paths.volumes.glob("[!.]*.ext4"))

    def size_mb(self, volume_id: str) -> int:
        """How large a volume may become, in MiB.  Raises OSError."""
        return self._image(volume_id).stat().st_size // MIB

    def used(self, volume_id: str) -> DiskSize:
        """The space that a volume takes on the host.  Raises OSError."""
        image, target = self._image(volume_id), self.mount_point(volume_id)
        try:
            allocated = image.stat().st_blocks * 512
        except FileNotFoundError:
            allocated = self._unfinished(volume_id).stat().st_blocks * 512
        if not is_mounted(target):
            return DiskSize(allocated, 0)
        stat = os.statvfs(target)
        return DiskSize(allocated, (stat.f_blocks - stat.f_bfree) * stat.f_frsize)

    # Pieces --------------------------------------------------------------------------------

    @property
    def _mounts(self) -> Path:
        return RunDir.of(self.instance).volumes

    def _image(self, volume_id: str) -> Path:
        return self.paths.volumes / f"{volume_id}.ext4"

    def _unfinished(self, volume_id: str) -> Path:
        return self.paths.volumes / f".{volume_id}.new"

    def _copy_of(self, volume_id: str) -> Path:
        return self.paths.volumes / f".{volume_id}.copy"

    def _create(self, image: Path, request: AttachVolume) -> None:
        """Make an empty file system, with the root that its users are to find."""
        image.unlink(missing_ok=True)
        try:
            _make_filesystem(image, request.size_mb)
            with locked(image) as descriptor:
                target = self._mount(request.id, descriptor)
            try:
                target.chmod(_ROOT_MODE)
                # e2fsck(8) makes another one if it ever needs it.
                (target / "lost+found").rmdir()
            finally:
                self.detach(request.id)
        except BaseException:
            image.unlink(missing_ok=True)
            raise

    def _mount(self, volume_id: str, image: int) -> Path:
        """Mount an open and locked file.  Raises VolumeDamaged, HostError, OSError."""
        target = self._make_mount_point(volume_id)
        try:
            with loop_device(image) as device:
                kernel.mount(device, target, "ext4", _FLAGS, _OPTIONS)
        except BaseException as error:
            with contextlib.suppress(OSError):
                target.rmdir()
            # What ext4 says of a file system that it does not accept.
            if isinstance(error, OSError) and error.errno in {errno.EUCLEAN, errno.EINVAL}:
                raise VolumeDamaged(_DAMAGED) from error
            raise
        return target

    def _make_mount_point(self, volume_id: str) -> Path:
        ensure_directory(self._mounts, 0o700)
        target = self.mount_point(volume_id)
        target.mkdir(mode=0o700, exist_ok=True)
        return target


def _device_of(image: Path) -> str | None:
    """The name of the loop device that has a file; None if none has (sysfs-block-loop in the
    kernel's Documentation/ABI/testing)."""
    devices = Path("/sys/block").glob("loop*")
    return next((device.name for device in devices if _has_file(device, image)), None)


def _has_file(device: Path, image: Path) -> bool:
    try:
        return image.samefile((device / "loop/backing_file").read_text().rstrip("\n"))
    except OSError:
        return False


@contextmanager
def locked(image: Path) -> Iterator[int]:
    """A descriptor of a volume's file, locked.  Raises VolumeInUse, FileNotFoundError, OSError.

    A loop device that is made from it within the block keeps the lock until it is released.
    """
    descriptor = os.open(image, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise VolumeInUse(_IN_USE) from None
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _frozen(target: Path) -> Iterator[None]:
    """Everything that is mounted at ``target`` is in its file, and stays so, in this block."""
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, FITHAW, 0)
    finally:
        os.close(descriptor)


def _thaw(target: Path) -> None:
    """Thaw what a killed agent left frozen; nothing else is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, FITHAW, 0)
        finally:
            os.close(descriptor)


def copy_sparse(source: Path, target: Path, check: Check = no_check) -> None:
    """Copy a file with its holes, to a new one.  Raises OSError, and what ``check`` does."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with source.open("rb") as original:
        descriptor = os.open(target, flags, 0o600)
        try:
            clone_or_copy(original.fileno(), descriptor, check)
        finally:
            os.close(descriptor)


def _make_filesystem(image: Path, size_mb: int) -> None:
    descriptor = os.open(image, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_mb * MIB)
    finally:
        os.close(descriptor)
    journal_mb = _SMALL_JOURNAL_MB if size_mb < _SMALL_MB else _JOURNAL_MB
    options = ["-b", "4096", "-I", "256", "-m", "0", "-i", "16384", "-J", f"size={journal_mb}"]
    argv = ["mke2fs", "-q", "-F", "-t", "ext4", *options, "-O", _FEATURES, "-E", _EXTENDED]
    run([*argv, str(image)], timeout=_MKFS_SECONDS)


def _repair(image: Path) -> None:
    """Replay the journal, and check what ext4 has marked as wrong.

    Raises VolumeDamaged, HostFault (it could not be checked: nothing is known of it).
    """
    try:
        result = run(["e2fsck", "-p", str(image)], timeout=_FSCK_SECONDS, check=False)
    except HostError as error:
        _log.error("volume %s could not be checked: %s", image.stem, error)
        raise HostFault(_UNCHECKED) from error
    if result.returncode in _FSCK_SUCCESS:
        return
    said = (result.stdout + result.stderr).decode("utf-8", "replace").strip()[-500:]
    if result.returncode & ~_FSCK_FOUND and _has_superblock(image):
        _log.error("volume %s could not be checked: %s", image.stem, said)
        raise HostFault(_UNCHECKED)
    _log.error("volume %s is damaged: %s", image.stem, said)
    raise VolumeDamaged(_DAMAGED)


def _has_superblock(image: Path) -> bool:
    """Whether there is a file system at all: without one e2fsck(8) exits as if it had failed."""
    with image.open("rb") as file:
        file.seek(_MAGIC_OFFSET)
        return file.read(len(_MAGIC)) == _MAGIC
