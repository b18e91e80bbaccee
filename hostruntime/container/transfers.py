"""Sending whole files into and out of containers, however large they are.

Both directions are streams with back-pressure: what the receiver does not take waits with the
sender, and nothing but a few buffers is held here.  A transfer can last as long as its client
likes, and has a process inside the container all that time, so their number is limited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from hostruntime.container.files import FileService, OpenedPart
from hostruntime.errors import TooManyTransfers
from hostruntime.wire.files import WantedPart

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
    async def download(self, name: str, path: str, wanted: WantedPart) -> AsyncIterator[OpenedPart]:
        """Open a part of a file.

        Raises NotFound, FileConflict (not a file), RangeNotSatisfiable, TooManyTransfers,
        InvalidRequest.
        """
        with self._counted(name):
            async with self.files.read_part(name, path, wanted) as opened:
                yield opened

    async def upload(
        self, name: str, path: str, content: AsyncIterator[bytes], size: int | None
    ) -> int:
        """Write a file of mode 0644 whole or not at all; return its size in bytes.

        Raises FileConflict, NoSpace, TooManyTransfers, InvalidRequest.
        """
        with self._counted(name):
            return await self.files.write(name, path, content, mode=_FILE_MODE, size=size)

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
