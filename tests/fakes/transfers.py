"""Files that are streamed into and out of the fake host's sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hostruntime.errors import FileConflict, RangeNotSatisfiable
from hostruntime.wire.files import FileContent, FilePart, WantedPart

# So that a file is more than one piece.
PIECE_BYTES = 1000


class FakeTransfers:
    """The part of the client that streams; over the rest of the fake."""

    read_path: Any
    write_file: Any

    @asynccontextmanager
    async def read_part(
        self, sandbox_id: str, path: str, wanted: WantedPart
    ) -> AsyncIterator[tuple[FilePart, AsyncIterator[bytes]]]:
        """As the client."""
        found = self.read_path(sandbox_id, path, max_bytes=1 << 60)
        if not isinstance(found, FileContent):
            raise FileConflict(f"{path} is a directory, not a file.")
        data, size = found.content, found.stat.size
        if wanted.first is not None:
            end = None if wanted.last is None else wanted.last + 1
            data = data[wanted.first : end]
            first = wanted.first
        else:
            first = 0 if wanted.last is None else max(size - wanted.last, 0)
            data = data[first:]
        if wanted != WantedPart() and not data:
            raise RangeNotSatisfiable(f"{path} has {size} bytes.", size=size)
        yield FilePart(found.stat, first, len(data)), self.pieces(data)

    async def pieces(self, data: bytes) -> AsyncIterator[bytes]:
        """The bytes, a piece at a time."""
        for start in range(0, len(data), PIECE_BYTES):
            yield data[start : start + PIECE_BYTES]

    async def write_stream(
        self, sandbox_id: str, path: str, length: int, content: AsyncIterator[bytes]
    ) -> int:
        """As the client."""
        data = b"".join([piece async for piece in content])
        written: int = self.write_file(sandbox_id, path, data, mode=0o644)
        return written
