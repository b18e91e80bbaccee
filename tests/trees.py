"""All that makes a tree what it is, as one digest: to see that nothing in it has changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from hostruntime.image.trees import (
    MAX_DEPTH,
    TreeTooDeep,
    attributes,
    child_path,
    is_directory,
    list_entries,
    lstat,
    open_directory,
)

PIECE = 1024 * 1024


def tree_digest(tree: Path) -> str:
    """SHA-256 (hexadecimal) of all that makes a tree what it is, in the order of names.

    Names, types, modes, owners, modification times, contents, symlink targets, device numbers and
    extended attributes count; link counts, inode numbers, access and change times do not, for
    they change when another tree links to a file.
    """
    digest = hashlib.sha256()

    def visit(dir_fd: int, path: bytes, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise TreeTooDeep
        for entry in sorted(list_entries(dir_fd), key=lambda item: os.fsencode(item.name)):
            name = path + b"/" + os.fsencode(entry.name)
            _describe(digest.update, name, entry.name, dir_fd)
            if is_directory(entry):
                with open_directory(entry.name, dir_fd) as inner:
                    visit(inner, name, depth + 1)

    with open_directory(tree) as root:
        _describe(digest.update, b"/", ".", root)
        visit(root, b"", 0)
    return digest.hexdigest()


def _describe(update: Callable[[bytes], None], path: bytes, name: str, dir_fd: int) -> None:
    found = lstat(name, dir_fd)
    fields = (found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev)
    update(b"\0".join((path, *(str(field).encode() for field in fields))) + b"\0")
    for attribute in sorted(attributes(name, dir_fd)):
        update(attribute.encode("utf-8", "surrogateescape") + b"=")
        update(os.getxattr(child_path(name, dir_fd), attribute, follow_symlinks=False) + b"\0")
    if stat.S_ISLNK(found.st_mode):
        update(os.fsencode(os.readlink(name, dir_fd=dir_fd)))
    elif stat.S_ISREG(found.st_mode):
        update(_content_digest(name, dir_fd))
    update(b"\n")


def _content_digest(name: str, dir_fd: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    content = hashlib.sha256()
    descriptor = os.open(name, flags, dir_fd=dir_fd)
    try:
        while block := os.read(descriptor, PIECE):
            content.update(block)
    finally:
        os.close(descriptor)
    return content.digest()
