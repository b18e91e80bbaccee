"""Saving and restoring the contents of a container's tmpfs as an archive, from inside.

``tar`` runs in the container, so that the host follows no path of a tenant's, and only ``tar`` in
a container ever reads its archives.  Files that change while they are read are archived as they
are found, one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hostruntime.container.exec import Chunk, Exited, shell_argv
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import HostFault
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.tasks import in_thread

_CHUNK_BYTES = 64 * 1024
_TMPFS = "tmp workspace dev/shm"
_ATTRIBUTES = "--xattrs --xattrs-include=user.* --xattrs-include=security.capability"
_INITIAL = "\n".join(["1777:0:0"] * len(_TMPFS.split()))
# Writes nothing if all tmpfs are still in their initial state. Mostly they are, after each step of
# a build: the shell itself looks for names, and starts one process instead of seven.
SAVE_TMPFS = f"""cd / || exit
save() {{ exec tar --create --format=posix --sparse --numeric-owner {_ATTRIBUTES} {_TMPFS}; }}
for d in {_TMPFS}; do
  for f in $d/* $d/.[!.]* $d/..?*; do
    if [ -e "$f" ] || [ -L "$f" ]; then save; fi
  done
done
[ "$(stat -c %a:%u:%g {_TMPFS})" = "{_INITIAL}" ] || save"""
RESTORE_TMPFS = (
    f"exec tar --extract --directory=/ --preserve-permissions --numeric-owner {_ATTRIBUTES}"
)
# tar's exit status if files changed or disappeared while it read them (tar(1)).
TAR_FILES_CHANGED = 1


@dataclass
class _Archive:
    """An open archive, and how many bytes of it were written or read.

    Counted, as to ask for a file's position waits for what is being written, and thus for the disk
    (f_pos_lock, which write(2) and lseek(2) share).
    """

    file: BinaryIO
    moved: int = 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.moved += len(data)

    def feed(self, target: int) -> None:
        """Send everything to a pipe, and close that."""
        try:
            # The reader may exit first.
            with contextlib.suppress(BrokenPipeError):
                while sent := os.sendfile(target, self.file.fileno(), None, _CHUNK_BYTES):
                    self.moved += sent
        finally:
            os.close(target)


async def save_tmpfs(
    containers: ContainerManager, owner: str, target: Path, *, max_bytes: int, timeout: float
) -> int | None:
    """Archive the tmpfs to the new file ``target``, which is not created if they are empty.

    Returns tar's exit status, 0 or :data:`TAR_FILES_CHANGED` if there is an archive, and None if
    nothing was written for ``timeout`` seconds or the archive would exceed ``max_bytes``.
    """
    archive = _Archive(await in_thread(_create, target))
    try:
        patience = Patience(scaled(timeout), marker=lambda: archive.moved)
        status = await _run_inside(
            containers, owner, SAVE_TMPFS, patience, output=archive, max_bytes=max_bytes
        )
    finally:
        # Buffered data is written to the disk now.
        await in_thread(archive.file.close)
    await in_thread(_unlink_if_empty, target)
    return status


def _create(path: Path) -> BinaryIO:
    return path.open("xb")


def _unlink_if_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        path.unlink()


async def restore_tmpfs(
    containers: ContainerManager, owner: str, archive: Path, *, timeout: float
) -> None:
    """Restore the tmpfs of a container that has just been started.

    Afterwards everything except its init is killed.  Raises HostError, OSError if it fails, or if
    nothing was read for ``timeout`` seconds.
    """
    async with _pipe_from(archive) as (stdin, bytes_read):
        patience = Patience(scaled(timeout), marker=bytes_read)
        status = await _run_inside(containers, owner, RESTORE_TMPFS, patience, stdin=stdin)
        # Leftover processes could keep the pipe open.
        await containers.kill_all_but_init(owner)
    if status != 0:
        raise HostFault(f"The archive {archive} could not be unpacked.")


async def _run_inside(
    containers: ContainerManager,
    owner: str,
    command: str,
    patience: Patience,
    *,
    stdin: int | None = None,
    output: _Archive | None = None,
    max_bytes: int = 0,
) -> int | None:
    """Run a command; return its exit status, None if it stalled or wrote too much."""
    frames = containers.exec(owner, shell_argv(command), cwd="/", env={}, timeout=None, stdin=stdin)
    with contextlib.suppress(TimeoutError):
        async with aclosing(frames) as stream, patience:
            async for frame in stream:
                if isinstance(frame, Exited):
                    return frame.code
                if isinstance(frame, Chunk) and frame.stream == "stdout" and output is not None:
                    if output.moved + len(frame.data) > max_bytes:
                        break
                    # In a thread: a slow disk must not block the event loop.
                    await asyncio.to_thread(output.write, frame.data)
    return None


@asynccontextmanager
async def _pipe_from(path: Path) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """The read end of a pipe fed from a file, and a function that returns how much was read.

    A pipe, because no file's descriptor is passed inside.
    """
    archive = _Archive(await in_thread(path.open, "rb"))
    try:
        read_end, write_end = os.pipe()
        feeding = asyncio.ensure_future(asyncio.to_thread(archive.feed, write_end))
        try:
            yield read_end, lambda: archive.moved
        finally:
            os.close(read_end)
            await asyncio.wait([feeding])
    finally:
        await in_thread(archive.file.close)
