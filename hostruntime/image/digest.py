"""An image's digest: equal for trees with equal content, whenever and wherever they were built.

``sha256:`` and the SHA-256, in hexadecimal, of a canonical listing. The listing begins with the
record ``orkestr-image-1`` and the digest of the base (empty without one). Then, directory by
directory, sorted by the bytes of the names, follows a record for

* every entry that is not the base's entry of that path (the same inode): ``+``, path, type
  (``d f l p`` for directory, file, link, pipe), permission bits (octal), uid, gid, size (0 for a
  directory), content, and each extended attribute's name and value (hexadecimal);
* every path that was deleted from the base: ``-`` and the path.

A record is its fields, each terminated by NUL, and a newline. The content of a link is its target;
that of a file is the SHA-256 (hexadecimal) of each of its 64 KiB blocks that is not all zero, in
order, each preceded by its offset (8 bytes, big-endian): a hole costs nothing and counts as zeros.

Times, inode numbers and hard links between names do not count. Files shared with the base are
skipped, so the cost of a digest depends on the image's own files only; and files that a capture
has just written are not read again (:mod:`hostruntime.image.content_hash`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Collection, Iterable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from hostruntime.host.progress import Progress
from hostruntime.image.content_hash import BLOCK, ContentHash, ContentHashCache
from hostruntime.image.sparse import data_extents
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

VERSION = "orkestr-image-1"
_READ_SIZE = 16 * BLOCK
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TYPES = {stat.S_IFDIR: b"d", stat.S_IFREG: b"f", stat.S_IFLNK: b"l", stat.S_IFIFO: b"p"}


def image_digest(
    tree: Path,
    base: Path | None = None,
    base_digest: str = "",
    check: Check = no_check,
    *,
    known: ContentHashCache | None = None,
    progress: Progress | None = None,
    linked: dict[int, bytes] | None = None,
    only: Collection[str] | None = None,
) -> str:
    """Compute the digest of ``tree``, built over ``base``, whose digest is ``base_digest``.

    Files whose hash is ``known`` are not read again. ``progress`` counts the names visited and
    their bytes. ``linked`` caches content by inode; pass it again for other trees that share files
    with this one, provided nothing writes to them meanwhile. With ``only``, other names at the
    top level are ignored. Raises TreeTooDeep, OSError, and whatever ``check`` raises.
    """
    with ExitStack() as stack:
        root = stack.enter_context(open_directory(tree))
        below = stack.enter_context(open_directory(base)) if base is not None else None
        listing = _Listing(check, known or ContentHashCache(), progress or Progress(), linked)
        listing.add_record([VERSION.encode(), base_digest.encode()])
        listing.add_entry(b"/", ".", root)
        listing.visit(root, below, b"", 0, only)
    return listing.digest()


class _Listing:
    """A running hash of the listing's records."""

    def __init__(
        self,
        check: Check,
        known: ContentHashCache,
        progress: Progress,
        linked: dict[int, bytes] | None,
    ) -> None:
        self._check = check
        self._known = known
        self._progress = progress
        self._hash = hashlib.sha256()
        # Content of files with several names, so that each is read once.
        self._contents = {} if linked is None else linked

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def add_record(self, fields: Iterable[bytes]) -> None:
        self._hash.update(b"\0".join([*fields, b"\n"]))

    def visit(
        self,
        tree: int,
        base: int | None,
        path: bytes,
        depth: int,
        only: Collection[str] | None = None,
    ) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        old = {} if base is None else {entry.name: entry for entry in list_entries(base)}
        new = {
            entry.name: entry for entry in list_entries(tree) if only is None or entry.name in only
        }
        for name in _in_order(old.keys() | new.keys()):
            self._check()
            entry = new.get(name)
            if entry is None:
                self.add_record([b"-", _child(path, name)])
            elif is_directory(entry):
                child = _child(path, name)
                self.add_entry(child, name, tree)
                self._enter(name, tree, base, child, depth + 1)
            # Most files are the base's own: nothing is made for those.
            elif name not in old or old[name].inode() != entry.inode():
                self.add_entry(_child(path, name), name, tree)

    def _enter(self, name: str, tree: int, base: int | None, path: bytes, depth: int) -> None:
        below = nullcontext() if base is None else open_if_directory(name, base)
        with open_directory(name, tree) as inner, below as shown:
            self.visit(inner, shown, path, depth)

    def add_entry(self, path: bytes, name: str, dir_fd: int) -> None:
        found = lstat(name, dir_fd)
        mode, size = found.st_mode, found.st_size
        kind = _TYPES.get(stat.S_IFMT(mode), b"?")
        if kind == b"d":
            size = 0
        else:
            self._progress.files += 1
            self._progress.bytes += size
        numbers = b"%o\0%d\0%d\0%d" % (stat.S_IMODE(mode), found.st_uid, found.st_gid, size)
        fields = [b"+", path, kind, numbers]
        known = self._known.lookup(found)
        if known is not None:
            fields.append(known.hex().encode())
        else:
            fields.append(self._content(name, dir_fd, found))
            fields += _attribute_fields(name, dir_fd)
        self.add_record(fields)

    def _content(self, name: str, dir_fd: int, found: os.stat_result) -> bytes:
        if stat.S_ISLNK(found.st_mode):
            return os.fsencode(os.readlink(name, dir_fd=dir_fd))
        if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
            return b""
        content = self._contents.get(found.st_ino)
        if content is None:
            content = self._read(name, dir_fd, found.st_size).hex().encode()
            if found.st_nlink > 1:
                self._contents[found.st_ino] = content
        return content

    def _read(self, name: str, dir_fd: int, size: int) -> bytes:
        content = ContentHash()
        descriptor = os.open(name, _READ_FLAGS, dir_fd=dir_fd)
        try:
            done = 0
            for start, end in [(0, size)] if size <= BLOCK else data_extents(descriptor):
                done = max(done, start - start % BLOCK)
                while done < end:
                    self._check()
                    length = min(_READ_SIZE, end - done)
                    data = os.pread(descriptor, length + -length % BLOCK, done)
                    if not data:
                        break
                    content.add(data, done)
                    done += len(data)
        finally:
            os.close(descriptor)
        return content.digest()


def _in_order(names: Collection[str]) -> list[str]:
    """Names in the order of their bytes, which is that of their characters where all are ASCII."""
    if all(map(str.isascii, names)):
        return sorted(names)
    return sorted(names, key=os.fsencode)


def _child(path: bytes, name: str) -> bytes:
    return path + b"/" + os.fsencode(name)


def _attribute_fields(name: str, dir_fd: int) -> list[bytes]:
    fields: list[bytes] = []
    for attribute in sorted(attributes(name, dir_fd)):
        with contextlib.suppress(OSError):
            value = os.getxattr(child_path(name, dir_fd), attribute, follow_symlinks=False)
            fields += [os.fsencode(attribute), value.hex().encode()]
    return fields
