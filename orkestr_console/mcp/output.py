"""Long output, cut in the middle."""

from __future__ import annotations


class TruncatedOutput:
    """Collects bytes and keeps at most ``limit`` of them: the first and the last."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.size = 0

    def feed(self, data: bytes) -> None:
        """Add output."""
        self.size += len(data)
        missing = self._half - len(self._head)
        if missing > 0:
            self._head += data[:missing]
            data = data[missing:]
        self._tail += data
        # Cut rarely: each cut copies what remains.
        if len(self._tail) > 4 * self._half:
            del self._tail[: -self._half]

    @property
    def omitted(self) -> int:
        """The number of bytes left out of the middle."""
        return max(self.size - 2 * self._half, 0)

    def text(self) -> str:
        """The output, with a note where it was cut; invalid UTF-8 is replaced."""
        if not self.omitted:
            return bytes(self._head + self._tail).decode(errors="replace")
        head = bytes(self._head).decode(errors="replace")
        tail = bytes(self._tail[-self._half :]).decode(errors="replace")
        return f"{head}\n[… {self.omitted:,} bytes left out …]\n{tail}"
