"""A program's output as HTML: colours as classes, progress lines redrawn, and nothing else.

Supported from ECMA-48 and xterm: SGR (colours, bold, …), carriage return, backspace and
erase-in-line, which progress bars use. Every other sequence is dropped. Text is escaped; invisible
and text-direction characters (Unicode TR 36) are shown as code points, not applied. The work is
linear in the text's length, whatever the text is.
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

MAX_LINES = 2000
MAX_LINE_LENGTH = 16 * 1024
MAX_SEQUENCE_LENGTH = 4096
MAX_PARAMETERS = 64
# A page gets at most this much of a text, its end: rendering 16 MiB would delay everybody.
MAX_SHOWN_CHARS = 1024 * 1024

# Text up to the next control; or one control: line end, CSI, a string such as OSC, another escape.
# Hostile output passes through here: no alternative may scan to the end and then fail. None
# contains a line feed, so that a line has the same number here as in the text.
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
# An incomplete escape sequence, or the first half of a line end, at the end of the text.
_INCOMPLETE = re.compile(r"(?:\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b\n]*\x1b?|[ -/]*)|\r{1,4})\Z")


@dataclass(frozen=True, slots=True)
class Style:
    """A character's style: colours by number (xterm's 16), and marks."""

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
MARK_CODES = {1: "bold", 2: "dim", 3: "ital", 4: "under", 7: "inv", 9: "strike"}
CUBE_LEVELS = (0, 95, 135, 175, 215, 255)
UNMARK_CODES = {22: {"bold", "dim"}, 23: {"ital"}, 24: {"under"}, 27: {"inv"}, 29: {"strike"}}


def apply_sgr(style: Style, parameters: str) -> Style:
    """The style after ``CSI parameters m``."""
    parameter_list = re.split("[;:]", parameters, maxsplit=MAX_PARAMETERS)[:MAX_PARAMETERS]
    codes = [int(code) if code.isdecimal() and len(code) < 4 else 0 for code in parameter_list]
    while codes:
        code = codes.pop(0)
        if code == 0:
            style = PLAIN
        elif code in MARK_CODES:
            style = replace(style, marks=style.marks | {MARK_CODES[code]})
        elif code in UNMARK_CODES:
            style = replace(style, marks=style.marks - UNMARK_CODES[code])
        elif code in {38, 48}:
            colour = parse_extended_colour(codes)
            style = (
                replace(style, fore=colour)
                if code == 38
                else replace(style, back=dark_colour(colour))
            )
        else:
            style = apply_colour(style, code)
    return style


def apply_colour(style: Style, code: int) -> Style:
    """The style after one of the basic colour codes; others change nothing."""
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


def parse_extended_colour(codes: list[int]) -> int | None:
    """The nearest of the 16 colours to ``5;n`` or ``2;r;g;b``, which are removed from ``codes``."""
    kind = codes.pop(0) if codes else 0
    if kind == 5 and codes:
        number = codes.pop(0)
        return number if number < 16 else nearest_colour(*xterm_rgb(number))
    if kind == 2 and len(codes) >= 3:
        red, green, blue = codes[:3]
        del codes[:3]
        return nearest_colour(red, green, blue)
    codes.clear()
    return None


def xterm_rgb(number: int) -> tuple[int, int, int]:
    """Red, green and blue of one of xterm's 256 colours, from number 16 on."""
    if number >= 232:
        grey = 8 + 10 * (min(number, 255) - 232)
        return grey, grey, grey
    number -= 16
    return CUBE_LEVELS[number // 36], CUBE_LEVELS[number // 6 % 6], CUBE_LEVELS[number % 6]


def nearest_colour(red: int, green: int, blue: int) -> int:
    """The nearest of the 16 colours, by its dominant channels and brightness."""
    top = max(red, green, blue)
    if top < 50:
        return 0
    bits = sum(bit for bit, value in ((1, red), (2, green), (4, blue)) if value * 3 >= top * 2)
    if bits == 7:
        return 8 if top < 130 else 7 if top < 230 else 15
    return bits + 8 if top > 200 else bits


def dark_colour(colour: int | None) -> int | None:
    """A background colour: one of the eight dark ones, so that text on it stays readable."""
    return None if colour is None else colour % 8


class Log:
    """Incremental rendering: feed it text, get the completed lines and the unfinished one."""

    def __init__(self) -> None:
        self._style = PLAIN
        self._chars: list[str] = []
        self._styles: list[Style] = []
        self._column = 0
        # So many cells from the left are already blank, and need not be blanked again.
        self._blank_until = 0
        self._incomplete = ""

    def feed(self, text: str) -> tuple[list[str], str]:
        """The HTML of the lines that ``text`` completes, and of the unfinished last line."""
        text = self._incomplete + text
        incomplete = _INCOMPLETE.search(text, max(len(text) - MAX_SEQUENCE_LENGTH, 0))
        self._incomplete = ""
        if incomplete:
            text, self._incomplete = text[: incomplete.start()], incomplete[0]
        lines: list[str] = []
        for token in _TOKENS.finditer(text):
            self._apply(token, lines)
        return lines, self._html()

    def _apply(self, token: re.Match[str], lines: list[str]) -> None:
        if token["text"] is not None:
            self._write(token["text"])
            if len(self._chars) >= MAX_LINE_LENGTH:
                lines.append(self._end_line())
        elif token["newline"] is not None:
            lines.append(self._end_line() + "\n")
        elif token["back"] is not None:
            self._column = 0 if token["back"] == "\r" else max(self._column - 1, 0)
        elif token["final"] == "m":
            self._style = apply_sgr(self._style, token["parameters"])
        elif token["final"] == "K":
            self._erase(token["parameters"])

    def _write(self, text: str) -> None:
        end = self._column + len(text)
        self._chars[self._column : end] = text
        self._styles[self._column : end] = [self._style] * len(text)
        self._blank_until = min(self._blank_until, self._column)
        self._column = end

    def _erase(self, parameters: str) -> None:
        if parameters == "1":
            until = min(self._column, len(self._chars))
            if until > self._blank_until:
                self._chars[self._blank_until : until] = " " * (until - self._blank_until)
                self._blank_until = until
            return
        if parameters == "2":
            self._column = 0
        del self._chars[self._column :], self._styles[self._column :]
        self._blank_until = min(self._blank_until, self._column)

    def _end_line(self) -> str:
        html = self._html()
        self._chars, self._styles, self._column, self._blank_until = [], [], 0, 0
        return html

    def _html(self) -> str:
        if not self._chars:
            return ""
        if self._styles.count(self._styles[0]) == len(self._styles):
            return styled_html("".join(self._chars), self._styles[0])
        cells = zip(self._chars, self._styles, strict=True)
        runs = groupby(cells, key=lambda cell: cell[1])
        return "".join(styled_html("".join(char for char, _ in run), style) for style, run in runs)


def styled_html(text: str, style: Style) -> str:
    """Escaped text, in a span if it has a style."""
    html = INVISIBLE.sub(lambda c: f'<span class="ctl">{code_point(c[0])}</span>', escape(text))
    return html if style == PLAIN else f'<span class="{style.classes}">{html}</span>'


def lines_html(lines: list[str], first: int | None = None) -> str:
    """Lines as elements, so that a page can drop the oldest of a long log.

    With ``first``, each has its number. The pieces of a very long line have that line's number.
    """
    if first is None:
        return "".join(f"<span>{line}</span>" for line in lines)
    html, number = [], first
    for line in lines:
        html.append(f'<span data-n="{number}">{line}</span>')
        number += line.endswith("\n")
    return "".join(html)


def count_line_ends(lines: Iterable[str]) -> int:
    """How many of the pieces end with a line feed."""
    return sum(line.endswith("\n") for line in lines)


@dataclass(frozen=True)
class RenderedLog:
    """A rendered log: its lines from number ``first`` on, and the unfinished line ``last``.

    ``first`` counts from 1 even if the lines have no numbers.
    """

    lines: SafeString
    tail: SafeString
    first: int
    last: int

    def __bool__(self) -> bool:
        return bool(self.lines or self.tail)

    @property
    def hidden(self) -> int:
        """How many earlier lines are not shown."""
        return self.first - 1


def render_tail(text: str) -> RenderedLog:
    """``text`` as HTML; only its last ``MAX_SHOWN_CHARS`` characters and ``MAX_LINES`` lines."""
    cut = len(text) - MAX_SHOWN_CHARS
    if cut <= 0:
        return render(text)
    # From the next line on, if one starts soon.
    cut = text.find("\n", cut, cut + MAX_LINE_LENGTH) + 1 or cut
    return render(text[cut:], first=text.count("\n", 0, cut) + 1)


def render(
    text: str,
    *,
    first: int = 1,
    lead: str = "",
    max_lines: int = MAX_LINES,
    numbered: bool = False,
) -> RenderedLog:
    """The last ``max_lines`` lines of ``text``, which starts with line ``first``, as HTML.

    ``lead`` is the text before it, whose final colours it continues.
    """
    log = Log()
    if lead:
        log.feed(lead if lead.endswith("\n") else f"{lead}\n")
    lines, tail = log.feed(text)
    kept_lines = deque(lines, maxlen=max_lines)
    begin = first + count_line_ends(islice(lines, len(lines) - len(kept_lines)))
    html = lines_html(list(kept_lines), begin if numbered else None)
    return RenderedLog(
        mark_safe(html),  # noqa: S308 - escaped in dressed()
        mark_safe(tail),  # noqa: S308 - the same
        begin,
        begin + count_line_ends(kept_lines),
    )
