"""A program's output as HTML: colours as classes, progress lines redrawn, nothing else obeyed.

What is understood of ECMA-48 and xterm: SGR (colours, bold, …), carriage return, backspace and
erase-in-line, which is what progress bars are made of. Every other sequence is dropped. Text is
escaped; characters that turn the direction of text or cannot be seen (Unicode TR 36) are shown,
not obeyed. The work is in proportion to the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby, islice

from django.utils.html import escape
from django.utils.safestring import SafeString, mark_safe

from orkestr_console.core.text import INVISIBLE, code_point

MOST_LINES = 2000
LONGEST_LINE = 16 * 1024
LONGEST_SEQUENCE = 4096
MOST_PARAMETERS = 64
# A page is given no more of a text than this, the end: drawing 16 MiB would hold up everybody.
LARGEST_SHOWN = 1024 * 1024

# Text up to the next special; or one special: line end, CSI, a string such as OSC, another escape.
# Hostile output comes through here: no alternative may read on to the end and then fail. None has
# a line feed inside: a line has the same number here as in the text.
_TOKENS = re.compile(
    r"(?P<text>[^\x00-\x1f\x7f-\x9f]+|\t)"
    r"|(?P<newline>\r{0,4}\n)"
    r"|(?P<back>[\r\b])"
    r"|\x1b\[(?P<parameters>[0-?]*)[ -/]*(?P<final>[@-~])"
    r"|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)"
    r"|\x1b[ -/]+[0-~]"
    r"|\x1b[0-OQ-WYZ`-~\\=>]"
    r"|[\x00-\x1f\x7f-\x9f]"
)
# An escape sequence, or the first half of a line end, that the text breaks off in.
_BROKEN_OFF = re.compile(r"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*\x1b?|[ -/]*)|\r{1,4})\Z")


@dataclass(frozen=True, slots=True)
class Style:
    """How a character looks: colours by number (xterm's 16), and marks."""

    fore: int | None = None
    back: int | None = None
    marks: frozenset[str] = frozenset()

    @property
    def classes(self) -> str:
        """The CSS classes."""
        colours = [f"f{self.fore}"] if self.fore is not None else []
        if self.back is not None:
            colours.append(f"g{self.back}")
        return " ".join([*colours, *sorted(self.marks)])


PLAIN = Style()
MARKS = {1: "bold", 2: "dim", 3: "ital", 4: "under", 7: "inv", 9: "strike"}
LEVELS = (0, 95, 135, 175, 215, 255)
UNMARKS = {22: {"bold", "dim"}, 23: {"ital"}, 24: {"under"}, 27: {"inv"}, 29: {"strike"}}


def restyled(style: Style, parameters: str) -> Style:
    """The style after ``CSI parameters m``."""
    given = re.split("[;:]", parameters, maxsplit=MOST_PARAMETERS)[:MOST_PARAMETERS]
    codes = [int(code) if code.isdecimal() and len(code) < 4 else 0 for code in given]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style = PLAIN
        elif code in MARKS:
            style = replace(style, marks=style.marks | {MARKS[code]})
        elif code in UNMARKS:
            style = replace(style, marks=style.marks - UNMARKS[code])
        elif code in {38, 48}:
            colour = extended(codes)
            style = replace(style, fore=colour) if code == 38 else replace(style, back=dark(colour))
        else:
            style = coloured(style, code)
    return style


def coloured(style: Style, code: int) -> Style:
    """The style after one of the plain colour codes; others change nothing."""
    if 30 <= code <= 37:
        return replace(style, fore=code - 30)
    if 90 <= code <= 97:
        return replace(style, fore=code - 82)
    if 40 <= code <= 47:
        return replace(style, back=code - 40)
    if 100 <= code <= 107:
        return replace(style, back=code - 100)
    if code == 39:
        return replace(style, fore=None)
    return replace(style, back=None) if code == 49 else style


def extended(codes: list[int]) -> int | None:
    """The nearest of 16 to ``5;n`` or ``2;r;g;b``, which are taken off ``codes``."""
    kind = codes.pop(0) if codes else 0
    if kind == 5 and codes:
        number = codes.pop(0)
        return number if number < 16 else nearest(*cube(number))
    if kind == 2 and len(codes) >= 3:
        red, green, blue = codes[:3]
        del codes[:3]
        return nearest(red, green, blue)
    codes.clear()
    return None


def cube(number: int) -> tuple[int, int, int]:
    """Red, green and blue of one of xterm's 256 colours from 16 on."""
    if number >= 232:
        grey = 8 + 10 * (min(number, 255) - 232)
        return grey, grey, grey
    number -= 16
    return LEVELS[number // 36], LEVELS[number // 6 % 6], LEVELS[number % 6]


def nearest(red: int, green: int, blue: int) -> int:
    """The one of 16 colours that is meant: which channels stand out, and whether it is bright."""
    top = max(red, green, blue)
    if top < 50:
        return 0
    bits = sum(bit for bit, value in ((1, red), (2, green), (4, blue)) if value * 3 >= top * 2)
    if bits == 7:
        return 8 if top < 130 else 7 if top < 230 else 15
    return bits + 8 if top > 200 else bits


def dark(colour: int | None) -> int | None:
    """A background: the eight dark ones are enough, so that text on them stays readable."""
    return None if colour is None else colour % 8


class Log:
    """Output as it grows: feed it text, get the lines that are complete and the one that is not."""

    def __init__(self) -> None:
        self._style = PLAIN
        self._chars: list[str] = []
        self._styles: list[Style] = []
        self._column = 0
        # So many cells from the left are known to be blank, and need not be blanked again.
        self._blank = 0
        self._rest = ""

    def feed(self, text: str) -> tuple[list[str], str]:
        """The HTML of the lines that ``text`` completed, and of the unfinished last line."""
        text = self._rest + text
        broken = _BROKEN_OFF.search(text, max(len(text) - LONGEST_SEQUENCE, 0))
        self._rest = ""
        if broken:
            text, self._rest = text[: broken.start()], broken[0]
        lines: list[str] = []
        for token in _TOKENS.finditer(text):
            self._take(token, lines)
        return lines, self._html()

    def _take(self, token: re.Match[str], lines: list[str]) -> None:
        if token["text"] is not None:
            self._write(token["text"])
            if len(self._chars) >= LONGEST_LINE:
                lines.append(self._end_line())
        elif token["newline"] is not None:
            lines.append(self._end_line() + "\n")
        elif token["back"] is not None:
            self._column = 0 if token["back"] == "\r" else max(self._column - 1, 0)
        elif token["final"] == "m":
            self._style = restyled(self._style, token["parameters"])
        elif token["final"] == "K":
            self._erase(token["parameters"])

    def _write(self, text: str) -> None:
        end = self._column + len(text)
        self._chars[self._column : end] = text
        self._styles[self._column : end] = [self._style] * len(text)
        self._blank = min(self._blank, self._column)
        self._column = end

    def _erase(self, parameters: str) -> None:
        if parameters == "1":
            until = min(self._column, len(self._chars))
            if until > self._blank:
                self._chars[self._blank : until] = " " * (until - self._blank)
                self._blank = until
            return
        if parameters == "2":
            self._column = 0
        del self._chars[self._column :], self._styles[self._column :]
        self._blank = min(self._blank, self._column)

    def _end_line(self) -> str:
        html = self._html()
        self._chars, self._styles, self._column, self._blank = [], [], 0, 0
        return html

    def _html(self) -> str:
        if not self._chars:
            return ""
        if self._styles.count(self._styles[0]) == len(self._styles):
            return dressed("".join(self._chars), self._styles[0])
        cells = zip(self._chars, self._styles, strict=True)
        runs = groupby(cells, key=lambda cell: cell[1])
        return "".join(dressed("".join(char for char, _ in run), style) for style, run in runs)


def dressed(text: str, style: Style) -> str:
    """Escaped text, in a span where it has a style."""
    html = INVISIBLE.sub(lambda c: f'<span class="ctl">{code_point(c[0])}</span>', escape(text))
    return html if style == PLAIN else f'<span class="{style.classes}">{html}</span>'


def lines_html(lines: list[str], first: int | None = None) -> str:
    """Lines as elements, so that a page can drop the oldest of a long log.

    With the number of the ``first`` each has its own. A piece of a very long line that was cut
    has the number of that line.
    """
    if first is None:
        return "".join(f"<span>{line}</span>" for line in lines)
    html, number = [], first
    for line in lines:
        html.append(f'<span data-n="{number}">{line}</span>')
        number += line.endswith("\n")
    return "".join(html)


def ended(lines: Iterable[str]) -> int:
    """How many of the pieces end a line."""
    return sum(line.endswith("\n") for line in lines)


@dataclass(frozen=True)
class Rendered:
    """A log as a page shows it: lines from number ``first`` on, and the unfinished line ``last``.

    Without numbers ``first`` counts from 1 all the same.
    """

    lines: SafeString
    tail: SafeString
    first: int
    last: int

    def __bool__(self) -> bool:
        return bool(self.lines or self.tail)

    @property
    def hidden(self) -> int:
        """How many lines before are not shown."""
        return self.first - 1


def rendered(text: str) -> Rendered:
    """``text`` as HTML; only its last ``LARGEST_SHOWN`` characters and ``MOST_LINES`` lines."""
    cut = len(text) - LARGEST_SHOWN
    if cut <= 0:
        return drawn(text)
    # From the next line on, if one begins soon: half a line says little.
    cut = text.find("\n", cut, cut + LONGEST_LINE) + 1 or cut
    return drawn(text[cut:], first=text.count("\n", 0, cut) + 1)


def drawn(
    text: str,
    *,
    first: int = 1,
    lead: str = "",
    most: int = MOST_LINES,
    numbered: bool = False,
) -> Rendered:
    """``text`` that begins with line ``first`` as HTML: its last ``most`` lines.

    ``lead`` is what stands before it; the text is in the colours that it ends with.
    """
    log = Log()
    if lead:
        log.feed(lead if lead.endswith("\n") else f"{lead}\n")
    lines, tail = log.feed(text)
    shown = deque(lines, maxlen=most)
    begin = first + ended(islice(lines, len(lines) - len(shown)))
    html = lines_html(list(shown), begin if numbered else None)
    return Rendered(
        mark_safe(html),  # noqa: S308 - escaped in dressed()
        mark_safe(tail),  # noqa: S308 - the same
        begin,
        begin + ended(shown),
    )
