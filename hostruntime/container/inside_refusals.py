"""Why a file operation in a container is refused, in words for whoever asked for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What the names of our own files begin with until they replace another; nobody asked for those.
TEMPORARY = ".ork-"


class Refusal(Exception):  # noqa: N818 - an answer, not a defect
    """The operation is refused; ``code`` is one of :mod:`hostruntime.errors`."""

    def __init__(self, code: str, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.extra = extra


_CODES: Mapping[int, tuple[str, str]] = {
    errno.ENOENT: ("not_found", "{path} does not exist."),
    errno.ENOTDIR: ("file_conflict", "A part of {path} is a file, not a directory."),
    errno.EISDIR: ("file_conflict", "{path} is a directory."),
    errno.EEXIST: ("file_conflict", "{path} already exists."),
    errno.ENOTEMPTY: ("file_conflict", "{path} is a directory that is not empty."),
    errno.EBUSY: ("file_conflict", "{path} is in use as a mount point."),
    errno.ELOOP: ("file_conflict", "{path} is a loop of symbolic links."),
    errno.EROFS: ("file_conflict", "{path} is on a read-only file system."),
    errno.EPERM: ("file_conflict", "{path} can't be changed."),
    errno.EACCES: ("file_conflict", "{path} can't be accessed."),
    errno.ENXIO: ("file_conflict", "{path} is not a regular file."),
    errno.EINVAL: ("file_conflict", "{path} can't be used that way."),
    errno.ENAMETOOLONG: ("invalid_request", "{path} is too long."),
    errno.ENOSPC: ("no_space", "There is no space left for {path}; delete something first."),
    errno.EDQUOT: ("no_space", "There is no space left for {path}; delete something first."),
    errno.EFBIG: ("file_too_large", "{path} would be larger than the file system allows."),
}


def explain(error: OSError, path: str) -> tuple[str, str]:
    """The code and the sentence for an error of the system's about a file."""
    code, template = _CODES.get(error.errno or 0, ("internal", "{path}: " + str(error.strerror)))
    error_path = Path(os.fsdecode(error.filename)).as_posix() if error.filename else path
    return code, template.format(path=path if TEMPORARY in error_path else error_path)
