"""What is in a container's tmpfs, as an archive: written from inside, and put back from inside.

``tar`` runs in the container, so that no path of a tenant's is followed by the host, and what it
writes is only ever read by ``tar`` in a container again.  Files that change while they are read
are taken as they are found, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from hostruntime.container.exec import Chunk, Exited, shell
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import HostFault
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.tasks import in_thread

_READ = 64 * 1024
_TMPFS = "tmp workspace dev/shm"
_ATTRIBUTES = "--xattrs --xattrs-include=user.* --xattrs-include=security.capability"
# Nothing at all where the tmpfs are as a container begins with them.
SAVE_TMPFS = f"""cd / || exit
for d in {_TMPFS}; do
  [ -z "$(ls -Ab $d)" ] && [ "$(stat -c %a:%u:%g $d)" = 1777:0:0 ] || exec \
    tar --create --format=posix --sparse --numeric-owner {_ATTRIBUTES} {_TMPFS}
done"""
RESTORE_TMPFS = (
    f"exec tar --extract --directory=/ --preserve-permissions --numeric-owner {_ATTRIBUTES}"
)
# What tar says of files that changed or went away while it read them (tar(1)).
CHANGED = 1


async def save_tmpfs(
    containers: ContainerManager, owner: str, target: Path, *, max_bytes: int, timeout: float
) -> int | None:
    """Write what is in the tmpfs to the new file ``target``, which is not there if nothing is.

    Returns the archiver's status, 0 or :data:`CHANGED` when there is an archive, and None if
    nothing was written for ``timeout`` seconds or would be more than ``max_bytes``.
    """
    file = await in_thread(_created, target)
    try:
        patience = Patience(scaled(timeout), marker=lambda: file.tell())
        status = await _run_inside(
            containers, owner, SAVE_TMPFS, patience, output=file, max_bytes=max_bytes
        )
    finally:
        # What is buffered yet goes to the disk now.
        await in_thread(file.close)
    await in_thread(_unlink_if_empty, target)
    return status


def _created(path: Path) -> BinaryIO:
    return path.open("xb")


def _unlink_if_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        path.unlink()


async def restore_tmpfs(
    containers: ContainerManager, owner: str, archive: Path, *, timeout: float
) -> None:
    """Fill the tmpfs of a container that has just been started.

    Everything but its init is killed then.  Raises HostError, OSError when it cannot be done, or
    when nothing was read for ``timeout`` seconds.
    """
    async with _fed(archive) as (stdin, taken):
        patience = Patience(scaled(timeout), marker=taken)
        status = await _run_inside(containers, owner, RESTORE_TMPFS, patience, stdin=stdin)
        # Whatever it left behind could hold on to the pipe.
        await containers.kill_strays(owner)
    if status != 0:
        raise HostFault(f"The archive {archive} could not be unpacked.")


async def _run_inside(
    containers: ContainerManager,
    owner: str,
    command: str,
    patience: Patience,
    *,
    stdin: int | None = None,
    output: BinaryIO | None = None,
    max_bytes: int = 0,
) -> int | None:
    """Run a command; return its status, None if it did not get on or wrote too much."""
    frames = containers.exec(owner, shell(command), cwd="/", env={}, timeout=None, stdin=stdin)
    written = 0
    with contextlib.suppress(TimeoutError):
        async with aclosing(frames) as stream, patience:
            async for frame in stream:
                if isinstance(frame, Exited):
                    return frame.code
                if isinstance(frame, Chunk) and frame.stream == "stdout" and output is not None:
                    written += len(frame.data)
                    if written > max_bytes:
                        break
                    # The disk may be slow: that is no matter to the event loop.
                    await asyncio.to_thread(output.write, frame.data)
    return None


@asynccontextmanager
async def _fed(path: Path) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """The end of a pipe that a file's content comes out of, and how much of it has been taken.

    No descriptor of a file goes inside.
    """
    file = await in_thread(path.open, "rb")
    try:
        reading, writing = os.pipe()
        source = file.fileno()
        feeding = asyncio.ensure_future(asyncio.to_thread(_feed, source, writing))
        try:
            yield reading, lambda: os.lseek(source, 0, os.SEEK_CUR)
        finally:
            os.close(reading)
            await asyncio.wait([feeding])
    finally:
        await in_thread(file.close)


def _feed(source: int, target: int) -> None:
    try:
        # Whoever reads may go away first.
        with contextlib.suppress(BrokenPipeError):
            while os.sendfile(target, source, None, _READ):
                pass
    finally:
        os.close(target)
