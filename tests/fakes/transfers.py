"""Files that are streamed into and out of the fake host's sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from hostruntime.container.inside_text import TextError, line_range, replaced
from hostruntime.errors import FileConflict, HostError, RangeNotSatisfiable
from hostruntime.wire.files import EditedFile, EditFile, FileContent, FilePart, WantedPart

# So that a file is more than one piece.
PIECE_BYTES = 1000


class FakeTransfers:
    """The part of the client that streams; over the rest of the fake."""

    read_path: Any
    stat: Any
    write_file: Any

    @asynccontextmanager
    async def read_part(
        self, sandbox_id: str, path: str, wanted: WantedPart
    ) -> AsyncIterator[tuple[FilePart, AsyncIterator[memoryview]]]:
        """As the client."""
        found = self.read_path(sandbox_id, path, max_bytes=1 << 60)
        if not isinstance(found, FileContent):
            raise FileConflict(f"{path} is a directory, not a file.")
        data, size = found.content, found.stat.size
        if wanted.line is not None:
            try:
                first, length = line_range(
                    lambda at, count: found.content[at : at + count],
                    size, wanted.line, wanted.lines, wanted.most or size,
                )  # fmt: skip
            except TextError as error:
                raise RangeNotSatisfiable(f"{path} {error.detail}.", size=size) from None
            yield FilePart(found.stat, first, length), self.pieces(data[first : first + length])
            return
        if wanted.first is not None:
            end = None if wanted.last is None else wanted.last + 1
            data = data[wanted.first : end]
            first = wanted.first
        else:
            first = 0 if wanted.last is None else max(size - wanted.last, 0)
            data = data[first:]
        if (wanted.first, wanted.last) != (None, None) and not data:
            raise RangeNotSatisfiable(f"{path} has {size} bytes.", size=size)
        data = data[: wanted.most]
        yield FilePart(found.stat, first, len(data)), self.pieces(data)

    async def pieces(self, data: bytes) -> AsyncIterator[memoryview]:
        """The bytes, a piece at a time; each is valid until the next is asked for."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            buffer[: len(piece)] = piece
            yield buffer[: len(piece)]

    async def write_stream(
        self, sandbox_id: str, path: str, length: int, content: AsyncIterator[bytes | memoryview]
    ) -> int:
        """As the client."""
        data = b"".join([bytes(piece) async for piece in content])
        written: int = self.write_file(sandbox_id, path, data, mode=0o644)
        return written

    def edit_file(self, sandbox_id: str, request: EditFile) -> EditedFile:
        """As the client."""
        found = self.read_path(sandbox_id, request.path, max_bytes=1 << 60)
        try:
            edited = replaced(
                found.content, request.old.encode(), request.new.encode(), request.count
            )
        except TextError as error:
            refusal = {"code": error.code, "detail": f"{request.path} {error.detail}."}
            raise HostError.from_wire(refusal) from None
        self.write_file(sandbox_id, request.path, edited.content)
        return EditedFile(request.path, len(edited.content), edited.times, edited.line)
