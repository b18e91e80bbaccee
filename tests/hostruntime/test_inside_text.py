"""Lines found in files of any size, and text replaced in one, without a container."""

from __future__ import annotations

import pytest

from hostruntime.container import inside_text
from hostruntime.container.inside_text import TextError, line_range, replaced

FIVE = b"one\ntwo\nthree\nfour\nfive\n"


class Content:
    """A file's content that notes how much is read of it at once."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.largest = 0

    def __call__(self, offset: int, count: int) -> bytes:
        part = self.content[offset : offset + count]
        self.largest = max(self.largest, len(part))
        return part


def lines(content: bytes, line: int, count: int | None = None, most: int = 1000) -> bytes:
    first, length = line_range(Content(content), len(content), line, count, most)
    return content[first : first + length]


@pytest.mark.parametrize(
    ("line", "count", "expected"),
    [
        (1, 1, b"one\n"),
        (2, 2, b"two\nthree\n"),
        (4, None, b"four\nfive\n"),
        (5, 99, b"five\n"),
        (-1, None, b"five\n"),
        (-2, 1, b"four\n"),
        (-99, 1, b"one\n"),
    ],
)
def test_lines_count_from_either_end(line: int, count: int | None, expected: bytes) -> None:
    assert lines(FIVE, line, count) == expected
    assert lines(FIVE.rstrip(b"\n"), line, count).rstrip() == expected.rstrip()


def test_what_there_is_not_is_said() -> None:
    assert lines(b"", 1) == b""
    assert lines(b"", -3) == b""
    for content in (b"", FIVE, FIVE.rstrip(b"\n")):
        with pytest.raises(TextError) as error:
            lines(content, 7)
        assert error.value.code == "range_not_satisfiable"
    assert lines(b"x" * 5000, 1, 1, most=10) == b"x" * 10


def test_a_large_file_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside_text, "PIECE_BYTES", 64)
    content = Content(b"".join(b"%06d\n" % number for number in range(1, 2001)))
    size = len(content.content)
    for line, expected in ((1, 1), (777, 777), (2000, 2000), (-1, 2000), (-1000, 1001)):
        first, length = line_range(content, size, line, 1, 64)
        assert content.content[first : first + length] == b"%06d\n" % expected
    assert content.largest == 64
    monkeypatch.setattr(inside_text, "MAX_SCANNED_BYTES", 1000)
    for line in (1999, -1999):
        with pytest.raises(TextError, match="too much before"):
            line_range(content, size, line, 1, 64)


def test_text_is_replaced_if_it_is_there_as_often_as_expected() -> None:
    assert replaced(FIVE, b"two", b"2", 1) == (b"one\n2\nthree\nfour\nfive\n", 1, 2)
    assert replaced(b"aaaa\xff", b"aa", b"", None) == (b"\xff", 2, 1)
    assert replaced(b"a\na", b"a", b"b", 2) == (b"b\nb", 2, 1)
    with pytest.raises(TextError, match="does not have that text"):
        replaced(FIVE, b"six", b"6", None)
    with pytest.raises(TextError, match=r"2 times \(lines 1, 3\), not once"):
        replaced(b"x\n\nx", b"x", b"y", 1)
    with pytest.raises(TextError, match=r"\(lines 1, 1, 1, 1, 1, …\), not 3 times"):
        replaced(b"x" * 9, b"x", b"y", 3)
    with pytest.raises(TextError, match="CR LF"):
        replaced(b"a\r\nb\r\n", b"a\nb", b"c", 1)


def test_it_does_not_grow_beyond_its_limit() -> None:
    with pytest.raises(TextError) as error:
        replaced(b"x" * 1000, b"x", b"y" * 1_000_000, None)
    assert error.value.code == "file_too_large"
