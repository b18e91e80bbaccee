"""Turn a stopped container's writable layer into a new tree over its base.

The new tree has a hard link for every file the container did not touch, plus the files of the
writable layer. Those are renamed if the layer is on the same file system, and otherwise copied;
holes and hard links are preserved. A large file is unlinked as soon as it is copied, so its pages
need no writeback; for a small one that would cost more than it saves. The content of small files
is hashed in passing, for the digest of the image. Overlayfs metadata is interpreted as the
kernel's Documentation/filesystems/overlayfs.rst defines it:

* a character device 0/0 is a whiteout: the base's entry of that name is deleted;
* ``trusted.overlay.opaque`` = ``y`` on a directory hides everything in the base's directory;
* ``trusted.overlay.redirect`` on a directory names the base directory that shows through
  (a sibling's name, or a path from the root if it starts with a slash).

Device nodes and sockets are omitted: a container cannot create the former, and the latter mean
nothing without their process. Extended attributes in the namespaces ``trusted.`` and
``security.`` (overlayfs metadata, labels of the host) are omitted too, except
``security.capability``: packages set it on their programs, and it only applies to the container's
own root, whose id is shifted when the image is mounted.

No file of the base is ever opened for writing; only its link count changes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.host.progress import Progress
from hostruntime.image.content_hash import ContentHashCache
from hostruntime.image.copying import (
    SMALL_BYTES,
    Copier,
    copy_metadata,
    copy_special,
    is_preserved,
    open_file,
)
from hostruntime.image.trees import (
    MAX_DEPTH,
    Check,
    TreeTooDeep,
    attributes,
    child_path,
    is_directory,
    list_entries,
    lstat,
    no_check,
    open_directory,
    open_if_directory,
)

_PATH_MAX = 4096
OPAQUE = "trusted.overlay.opaque"
REDIRECT = "trusted.overlay.redirect"
# The runtime provides or mounts these, whatever the layer has there.
NOT_CAPTURED = frozenset({".orkestr"})
MOUNT_POINTS: Mapping[str, int] = {
    "dev": 0o755,
    "proc": 0o555,
    "sys": 0o555,
    "tmp": 0o1777,
    "workspace": 0o1777,
}


@dataclass
class CaptureResult:
    """The result of a capture; ``known`` holds the content hashes of the small copied files."""

    known: ContentHashCache = field(default_factory=ContentHashCache)
    moved: int = 0
    copied: int = 0
    omitted: int = 0


def capture(
    base: Path,
    upper: Path,
    output: Path,
    check: Check = no_check,
    progress: Progress | None = None,
) -> CaptureResult:
    """Create ``output`` (which must not exist) from ``base`` and ``upper``; consumes ``upper``.

    ``base`` and ``output`` must be on one file system. ``progress`` counts the new tree's names
    and the bytes copied. Raises :class:`TreeTooDeep`, OSError, and whatever ``check`` raises; the
    caller must then remove a partial ``output``.
    """
    output.mkdir(mode=0o700)
    with (
        open_directory(base) as base_fd,
        open_directory(upper) as upper_fd,
        open_directory(output) as output_fd,
    ):
        walk = _Walk(base_fd, output_fd, check, progress or Progress())
        walk.same_filesystem = os.fstat(upper_fd).st_dev == os.fstat(output_fd).st_dev
        walk.merge_root(upper_fd, output_fd)
    return walk.result


class _Walk:
    """A capture in progress. Each method fills one directory of the new tree."""

    # Whether the layer and the new tree are on the same file system.
    same_filesystem = False

    def __init__(self, base_root: int, output_root: int, check: Check, progress: Progress) -> None:
        self._base_root = base_root
        self._output_root = output_root
        self._check = check
        self._progress = progress
        # The current path, and where each file with several names was copied to, by inode.
        self._path: list[str] = []
        self._copies: dict[int, str] = {}
        self.result = CaptureResult()
        self._copier = Copier(check, self.result.known, progress)

    def merge_root(self, upper: int, output: int) -> None:
        hidden = NOT_CAPTURED | MOUNT_POINTS.keys()
        self._merge(self._base_root, upper, output, 0, hidden)
        for name, mode in MOUNT_POINTS.items():
            with _create_directory(name, output) as directory:
                os.fchmod(directory, mode)
                os.utime(directory, ns=(0, 0))
        copy_metadata(upper, output)

    def _merge(
        self, base: int | None, upper: int, output: int, depth: int, hidden: frozenset[str]
    ) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        self._check()
        changed = [entry for entry in list_entries(upper) if entry.name not in hidden]
        if base is not None:
            self._link_all(base, output, depth, hidden | {entry.name for entry in changed})
        for entry in changed:
            self._check()
            if is_directory(entry):
                self._merge_directory(entry.name, base, upper, output, depth + 1)
            else:
                self._move(entry, upper, output)

    def _merge_directory(
        self, name: str, base_parent: int | None, upper: int, output: int, depth: int
    ) -> None:
        with (
            open_directory(name, upper) as inner,
            self._shown_through(name, inner, base_parent) as base,
            _create_directory(name, output) as created,
        ):
            self._path.append(name)
            self._merge(base, inner, created, depth, frozenset())
            self._path.pop()
            copy_metadata(inner, created)

    @contextmanager
    def _shown_through(self, name: str, inner: int, parent: int | None) -> Iterator[int | None]:
        """The base's directory that shows through the upper's directory ``inner``, if any."""
        redirect = _attribute(inner, REDIRECT)
        if _attribute(inner, OPAQUE) == b"y" or (redirect is None and parent is None):
            yield None
        elif redirect is not None and redirect.startswith(b"/"):
            with _open_path(self._base_root, os.fsdecode(redirect).split("/")[1:]) as found:
                yield found
        elif parent is not None:
            source = name if redirect is None else os.fsdecode(redirect)
            with _open_path(parent, [source]) as found:
                yield found
        else:
            yield None

    def _link_all(self, base: int, output: int, depth: int, hidden: frozenset[str]) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        self._check()
        for entry in list_entries(base):
            name = entry.name
            if name in hidden:
                continue
            self._check()
            if entry.is_dir(follow_symlinks=False):
                with (
                    open_directory(name, base) as inner,
                    _create_directory(name, output) as created,
                ):
                    self._link_all(inner, created, depth + 1, frozenset())
                    copy_metadata(inner, created)
                continue
            self._progress.files += 1
            try:
                os.link(name, name, src_dir_fd=base, dst_dir_fd=output, follow_symlinks=False)
            except OSError as error:
                if error.errno != errno.EMLINK:
                    raise
                self._copier.copy(name, base, output)
                self.result.copied += 1

    def _move(self, entry: os.DirEntry[str], upper: int, output: int) -> None:
        name, is_file = entry.name, entry.is_file(follow_symlinks=False)
        if not (is_file or entry.is_symlink()):
            kind = lstat(name, upper)
            if not stat.S_ISFIFO(kind.st_mode):
                self.result.omitted += not _is_whiteout(kind)
                return
        if self.same_filesystem:
            _strip_attributes(name, upper)
            os.rename(name, name, src_dir_fd=upper, dst_dir_fd=output)
        elif is_file:
            descriptor = open_file(name, upper)
            try:
                self._copy_across(name, os.fstat(descriptor), descriptor, upper, output)
            finally:
                os.close(descriptor)
        else:
            self._copy_across(name, lstat(name, upper), None, upper, output)
        self.result.moved += 1
        self._progress.files += 1

    def _copy_across(
        self, name: str, found: os.stat_result, descriptor: int | None, upper: int, output: int
    ) -> None:
        """Copy to another file system; further names of a copied file become hard links.

        ``descriptor`` is None unless this is a regular file.
        """
        if not self._link_to_copy(found.st_ino, name, output):
            if descriptor is None:
                copy_special(name, upper, output, found)
            else:
                self._copier.copy_file(descriptor, found, name, output)
            path = "/".join([*self._path, name]) if found.st_nlink > 1 else ""
            # link(2) cannot take a longer path, so each name then gets its own copy.
            if path and len(os.fsencode(path)) < _PATH_MAX:
                self._copies[found.st_ino] = path
        if found.st_size > SMALL_BYTES:
            os.unlink(name, dir_fd=upper)

    def _link_to_copy(self, inode: int, name: str, output: int) -> bool:
        copy = self._copies.get(inode)
        if copy is None:
            return False
        try:
            # This walk created every directory on the path, so none is a tenant's symlink.
            os.link(
                copy, name, src_dir_fd=self._output_root, dst_dir_fd=output, follow_symlinks=False
            )
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            return False
        return True


@contextmanager
def _create_directory(name: str, parent: int) -> Iterator[int]:
    os.mkdir(name, mode=0o700, dir_fd=parent)
    with open_directory(name, parent) as directory:
        yield directory


@contextmanager
def _open_path(root: int, names: list[str]) -> Iterator[int | None]:
    """Open a path below ``root`` one name at a time; None if any of it is not a directory."""
    with contextlib.ExitStack() as stack:
        found: int | None = root
        for name in names:
            if found is None or name in ("", ".", "..") or "/" in name:
                found = None
                break
            found = stack.enter_context(open_if_directory(name, found))
        yield found


def _is_whiteout(found: os.stat_result) -> bool:
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == 0


def _attribute(descriptor: int, name: str) -> bytes | None:
    try:
        return os.getxattr(descriptor, name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def _strip_attributes(name: str, dir_fd: int) -> None:
    for attribute in attributes(name, dir_fd):
        if not is_preserved(attribute):
            os.removexattr(child_path(name, dir_fd), attribute, follow_symlinks=False)
