"""Small records on disk, and what becomes of one that cannot be believed.

What is written here is JSON, whole or not at all (:func:`hostruntime.host.paths.write_json`).  It
can still be bad: cut off by a disk that lied, edited by hand, made by another version, come from a
backup, or not a file at all.  So each is held against its type when it is read, and a bad one is a
:class:`BadRecord`: whoever reads sets it aside (:mod:`hostruntime.image.quarantine`) and serves the
rest. That the machine cannot read at the moment (no descriptors, no memory) is an ``OSError`` as
ever: it says nothing about the record.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hostruntime.errors import HostFault

# For the ``__pydantic_config__`` of a record's dataclass: no value of another type, no number that
# is none.  A field that is not known is left out: a later version may have written it.
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
MAX_BYTES = 16 * 1024 * 1024
# The file's own fault, or its disk's; everything else is the machine's at this moment.
_BROKEN = frozenset(
    {errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
)


class BadRecord(HostFault):
    """A record on disk that is not what it should be; ``why`` says what is wrong with it."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} cannot be believed: {why}.")
        self.path = path
        self.why = why


def read_record[T](path: Path, kind: TypeAdapter[T]) -> T | None:
    """The record in the file ``path``, None where there is nothing of that name.

    Raises :class:`BadRecord`; OSError where the machine cannot read now.
    """
    try:
        data = _read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in _BROKEN:
            raise BadRecord(path, error.strerror or "it cannot be read") from error
        raise
    try:
        return kind.validate_json(data)
    except ValidationError as error:
        raise BadRecord(path, _first(error)) from error


def _read(path: Path) -> bytes:
    """A regular file's bytes: what hangs when it is opened, such as a FIFO, is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EISDIR, "it is not a regular file")
        if found.st_size > MAX_BYTES:
            raise OSError(errno.EBADMSG, "it is longer than any record")
        return file.read()


def _first(error: ValidationError) -> str:
    found: dict[str, Any] = dict(error.errors(include_url=False, include_input=False)[0])
    where = ".".join(str(part) for part in found["loc"])
    return f"{where}: {found['msg']}" if where else str(found["msg"])
