"""Output that is longer than an answer may be: its beginning and its end are kept."""

from __future__ import annotations


class Kept:
    """Bytes as they come; ``text()`` has at most ``limit`` characters of them, and says so."""

    def __init__(self, limit: int) -> None:
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self.size = 0

    def feed(self, data: bytes) -> None:
        """Take some more."""
        self.size += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        # Cut rarely: moving the rest up costs as much as what is kept.
        if len(self._tail) > 4 * self._half:
            del self._tail[: -self._half]

    @property
    def omitted(self) -> int:
        """How many bytes in the middle are left out."""
        return max(self.size - 2 * self._half, 0)

    def text(self) -> str:
        """What is kept; bytes that are no UTF-8 are replaced."""
        if not self.omitted:
            return bytes(self._head + self._tail).decode(errors="replace")
        head = bytes(self._head).decode(errors="replace")
        tail = bytes(self._tail[-self._half :]).decode(errors="replace")
        return f"{head}\n[… {self.omitted:,} bytes left out …]\n{tail}"
