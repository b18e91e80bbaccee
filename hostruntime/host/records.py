"""Small records on disk, and what happens to one that is invalid.

Records are JSON, written atomically (:func:`hostruntime.host.paths.write_json`).  They can still
be bad: truncated by a disk that lied, edited by hand, written by another version, restored from a
backup, or not a file at all.  So each is validated against its type when it is read, and a bad one
raises :class:`BadRecord`: the reader sets it aside (:mod:`hostruntime.image.quarantine`) and serves
the rest. If the machine cannot read at the moment (no descriptors, no memory), that is an
``OSError`` as usual: it says nothing about the record.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hostruntime.errors import HostFault

# For the ``__pydantic_config__`` of a record's dataclass: no value of another type, no NaN or
# infinity.  An unknown field is ignored: a later version may have written it.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
MAX_BYTES = 16 * 1024 * 1024
# The file or its disk is at fault; any other errno is a passing condition of the machine.
_CORRUPT_ERRNOS = frozenset(
    {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
)


class BadRecord(HostFault):
    """A record on disk is invalid; ``reason`` says what is wrong with it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} cannot be believed: {reason}.")
        self.path = path
        self.reason = reason


def read_record[T](path: Path, kind: TypeAdapter[T]) -> T | None:
    """Read the record in the file ``path``; None if the file does not exist.

    Raises :class:`BadRecord`; OSError if the machine cannot read at the moment.
    """
    try:
        data = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in _CORRUPT_ERRNOS:
            raise BadRecord(path, error.strerror or "it cannot be read") from error
        raise
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        raise BadRecord(path, _first_error(error)) from error


def _read(path: Path) -> bytes:
    """The bytes of a regular file; anything else is refused, as opening a FIFO could hang."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EISDIR, "it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EBADMSG, "it is longer than any record")
        return file.read()


def _first_error(error: ValidationError) -> str:
    first: dict[str, Any] = dict(error.errors(include_url=False, include_input=False)[0])
    location = ".".join(str(part) for part in first["loc"])
    return f"{location}: {first['msg']}" if location else str(first["msg"])
