"""Turning a stopped container's writable layer into a new tree over its base.

The new tree has a hard link for every file the container did not touch, and the writable layer's
own files: renamed where the layer is on the same file system, otherwise copied, holes as holes and
links as links.  A large file is unlinked as soon as it is copied, so that its pages need no writing
back; for a small one that would cost more than it saves.  What a small file holds is noted in
passing, for the digest of the image.  What the layer says in overlayfs's language is read as
Documentation/filesystems/overlayfs.rst of the kernel defines it:

* a character device 0/0 is a whiteout: the base's entry of that name is gone;
* ``trusted.overlay.opaque`` = ``y`` on a directory: nothing of the base's shows through;
* ``trusted.overlay.redirect`` on a directory: what shows through is the base's directory of
  that other name (a sibling's name, or from the root when it starts with a slash).

Device nodes and sockets are left out: the first cannot be made in a container, the second mean
nothing without their process.  So are extended attributes of the namespaces ``trusted.`` and
``security.`` (the overlay's own bookkeeping, labels of the host), except
``security.capability``: packages set it on their programs and it means something to the
container's own root only, whose id is shifted when the image is mounted.

No file of the base is ever opened for writing; at most its link count changes.
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
from hostruntime.image.copying import (
    SMALL_BYTES,
    Copier,
    copy_metadata,
    copy_special,
    kept,
    opened_file,
)
from hostruntime.image.known_contents import KnownContents
from hostruntime.image.trees import (
    MAX_DEPTH,
    Check,
    TreeTooDeep,
    attributes,
    child_path,
    entries,
    go_on,
    is_directory,
    opened,
    opened_if_directory,
    status,
)

_PATH_MAX = 4096
OPAQUE = "trusted.overlay.opaque"
REDIRECT = "trusted.overlay.redirect"
# What the runtime brings or mounts over, whatever the layer has there.
NOT_CAPTURED = frozenset({".orkestr"})
MOUNT_POINTS: Mapping[str, int] = {
    "dev": 0o755,
    "proc": 0o555,
    "sys": 0o555,
    "tmp": 0o1777,
    "workspace": 0o1777,
}


@dataclass
class Captured:
    """What a capture did.  ``known`` has of the small files that were copied what they hold."""

    known: KnownContents = field(default_factory=KnownContents)
    moved: int = 0
    copied: int = 0
    left_out: int = 0


def capture(
    base: Path,
    upper: Path,
    output: Path,
    check: Check = go_on,
    progress: Progress | None = None,
) -> Captured:
    """Make ``output`` (which must not exist) from ``base`` and ``upper``; ``upper`` is used up.

    ``base`` and ``output`` are on one filesystem.  ``progress`` counts the new tree's names, and
    the bytes that were copied.  Raises :class:`TreeTooDeep`, OSError, and what
    ``check`` does; a half-made ``output`` is the caller's to remove.
    """
    output.mkdir(mode=0o700)
    with opened(base) as base_fd, opened(upper) as upper_fd, opened(output) as output_fd:
        walk = _Walk(base_fd, output_fd, check, progress or Progress())
        walk.here = os.fstat(upper_fd).st_dev == os.fstat(output_fd).st_dev
        walk.merge_root(upper_fd, output_fd)
    return walk.result


class _Walk:
    """One capture under way.  Each method fills one directory of the new tree."""

    # Whether the layer is on the new tree's own file system.
    here = False

    def __init__(self, base_root: int, output_root: int, check: Check, progress: Progress) -> None:
        self._base_root = base_root
        self._output_root = output_root
        self._check = check
        self._progress = progress
        # Where the walk is, and where the files with several names were copied to, by inode.
        self._path: list[str] = []
        self._copies: dict[int, str] = {}
        self.result = Captured()
        self._copier = Copier(check, self.result.known, progress)

    def merge_root(self, upper: int, output: int) -> None:
        hidden = NOT_CAPTURED | MOUNT_POINTS.keys()
        self._merge(self._base_root, upper, output, 0, hidden)
        for name, mode in MOUNT_POINTS.items():
            with _made(name, output) as directory:
                os.fchmod(directory, mode)
                os.utime(directory, ns=(0, 0))
        copy_metadata(upper, output)

    def _merge(
        self, base: int | None, upper: int, output: int, depth: int, hidden: frozenset[str]
    ) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        self._check()
        changed = [entry for entry in entries(upper) if entry.name not in hidden]
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
            opened(name, upper) as inner,
            self._shown_through(name, inner, base_parent) as base,
            _made(name, output) as made,
        ):
            self._path.append(name)
            self._merge(base, inner, made, depth, frozenset())
            self._path.pop()
            copy_metadata(inner, made)

    @contextmanager
    def _shown_through(self, name: str, inner: int, parent: int | None) -> Iterator[int | None]:
        """The base's directory that shows through the upper's directory ``inner``, if any."""
        redirect = _attribute(inner, REDIRECT)
        if _attribute(inner, OPAQUE) == b"y" or (redirect is None and parent is None):
            yield None
        elif redirect is not None and redirect.startswith(b"/"):
            with _opened_below(self._base_root, os.fsdecode(redirect).split("/")[1:]) as found:
                yield found
        elif parent is not None:
            source = name if redirect is None else os.fsdecode(redirect)
            with _opened_below(parent, [source]) as found:
                yield found
        else:
            yield None

    def _link_all(self, base: int, output: int, depth: int, hidden: frozenset[str]) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        self._check()
        for entry in entries(base):
            name = entry.name
            if name in hidden:
                continue
            self._check()
            if entry.is_dir(follow_symlinks=False):
                with opened(name, base) as inner, _made(name, output) as made:
                    self._link_all(inner, made, depth + 1, frozenset())
                    copy_metadata(inner, made)
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
            kind = status(name, upper)
            if not stat.S_ISFIFO(kind.st_mode):
                self.result.left_out += not _is_whiteout(kind)
                return
        if self.here:
            _strip_attributes(name, upper)
            os.rename(name, name, src_dir_fd=upper, dst_dir_fd=output)
        elif is_file:
            descriptor = opened_file(name, upper)
            try:
                self._carry_over(name, os.fstat(descriptor), descriptor, upper, output)
            finally:
                os.close(descriptor)
        else:
            self._carry_over(name, status(name, upper), None, upper, output)
        self.result.moved += 1
        self._progress.files += 1

    def _carry_over(
        self, name: str, found: os.stat_result, descriptor: int | None, upper: int, output: int
    ) -> None:
        """Copy to another file system; other names of what was copied become links.

        ``descriptor`` is that of a regular file.
        """
        if not self._linked_to_copy(found.st_ino, name, output):
            if descriptor is None:
                copy_special(name, upper, output, found)
            else:
                self._copier.copy_file(descriptor, found, name, output)
            path = "/".join([*self._path, name]) if found.st_nlink > 1 else ""
            # By a longer path the copy could not be found again: each name gets one of its own.
            if path and len(os.fsencode(path)) < _PATH_MAX:
                self._copies[found.st_ino] = path
        if found.st_size > SMALL_BYTES:
            os.unlink(name, dir_fd=upper)

    def _linked_to_copy(self, inode: int, name: str, output: int) -> bool:
        copy = self._copies.get(inode)
        if copy is None:
            return False
        try:
            # Every directory on the way was made by this walk: none is a tenant's symlink.
            os.link(
                copy, name, src_dir_fd=self._output_root, dst_dir_fd=output, follow_symlinks=False
            )
        except OSError as error:
            if error.errno != errno.EMLINK:
                raise
            return False
        return True


@contextmanager
def _made(name: str, parent: int) -> Iterator[int]:
    os.mkdir(name, mode=0o700, dir_fd=parent)
    with opened(name, parent) as directory:
        yield directory


@contextmanager
def _opened_below(root: int, names: list[str]) -> Iterator[int | None]:
    """Open a path below ``root`` one name at a time; None if any of it is not a directory."""
    with contextlib.ExitStack() as stack:
        found: int | None = root
        for name in names:
            if found is None or name in ("", ".", "..") or "/" in name:
                found = None
                break
            found = stack.enter_context(opened_if_directory(name, found))
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
        if not kept(attribute):
            os.removexattr(child_path(name, dir_fd), attribute, follow_symlinks=False)
