"""Writing small files whole."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from hostruntime.host import kernel


def write_atomically(path: Path, data: bytes, mode: int = 0o600, *, durable: bool = False) -> None:
    """Replace ``path`` by ``data`` so that readers see all of the old or all of the new content.

    That holds if the writer dies, and with ``durable`` also after a power cut: the new content is
    then on disk on return, which costs two flushes of the disk.  Raises OSError.
    """
    # Each thread's own: several may write the same file at once.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as handle:  # noqa: PTH123 - a descriptor, not a path
            handle.write(data)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        kernel.fsync(path.parent)
