"""Sending whole files into and out of containers, however large they are.

The bytes pass between the process inside the container and whoever has the other end of its
connection; there is no copy of them here.  What the receiver doesn't take waits with the sender.  A
transfer can last as long as its client likes, and has a process inside the container all that time,
so their number is limited.

That connection is a pair of sockets, and must not be a pipe: splice(2) holds a pipe's lock while it
waits for a file.  Whoever then uses the other end waits for the sandbox's disk as well, even if it
is not to block.  Nor does anybody splice into such a socket: before Linux 6.5 that waits for the
lock of its reader.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field

from hostruntime.container.files import FileService, Stream, parse_answer, validate_path
from hostruntime.errors import TooManyTransfers
from hostruntime.wire.files import FilePart, WantedPart

MAX_TRANSFERS = 16
_FILE_MODE = 0o644


@dataclass
class TransferService:
    """Transfers of running containers, by container name.  For use on one event loop."""

    files: FileService
    _running: Counter[str] = field(default_factory=Counter)

    def running(self, name: str) -> int:
        """How many transfers of a container are under way."""
        return self._running[name]

    @asynccontextmanager
    async def download(
        self, name: str, path: str, wanted: WantedPart
    ) -> AsyncIterator[tuple[FilePart, Stream]]:
        """Open a part of a file; its bytes come from the stream, fewer if the file has been cut.

        Raises NotFound, FileConflict (not a file), RangeNotSatisfiable, TooManyTransfers,
        InvalidRequest.
        """
        arguments = {"path": validate_path(path), **asdict(wanted)}
        with self._counted(name):
            async with self.files.handed_over(name, "read_part", arguments) as stream:
                yield parse_answer(FilePart, await stream.header()), stream

    @asynccontextmanager
    async def upload(self, name: str, path: str, size: int) -> AsyncIterator[Stream]:
        """Write a file of mode 0644 and ``size`` bytes, which go into the stream.

        The stream's answer then has its ``size``.  It is written whole or not at all.
        Raises FileConflict, NoSpace, TooManyTransfers, InvalidRequest; so does the answer.
        """
        arguments = {"path": validate_path(path), "mode": _FILE_MODE, "size": size}
        with self._counted(name):
            async with self.files.handed_over(name, "write", arguments) as stream:
                await stream.header()
                yield stream

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        if self._running[name] >= MAX_TRANSFERS:
            raise TooManyTransfers(
                f"{MAX_TRANSFERS} files are being sent into or out of this sandbox, which is all "
                "that may be at once; wait until one of them has been."
            )
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]
