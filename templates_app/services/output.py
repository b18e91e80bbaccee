"""The output of a build's steps, in slices: its tail, a range of lines, and search.

Only a line feed ends a line, here and on the page, so that a line's number never changes. A running
step's output is only in its events; a finished step's row has all of it. Up to 9 MiB are stored per
step, so nothing here reads more than it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from django.db.models import F, Sum, TextField, Value
from django.db.models.expressions import CombinedExpression
from django.db.models.fields.json import KT
from django.db.models.functions import Cast, Length, Replace, Right

from orkestr_console.core.errors import NotFound
from orkestr_console.core.text import plain
from templates_app.models import Template
from templates_app.services.record import output_from_events

# A slice that starts in the middle of a line skips the rest of that line, if it ends this soon.
MAX_LINE_LENGTH = 16 * 1024
# How much text before a slice is read to find the colours it starts in.
LEAD = 16 * 1024
MAX_LINES = 1000
MAX_SLICE_CHARS = 512 * 1024
MAX_COUNTED_HITS = 10_000
EXCERPT_CHARS = 120
MAX_QUERY_LENGTH = 200


@dataclass(frozen=True)
class TextSlice:
    """A part of a step's output: ``text`` starts with line ``first``, counted from 1.

    ``lead`` is some of the text before it, for the colours it starts in.
    """

    text: str
    first: int
    lead: str = ""

    @property
    def last(self) -> int:
        """The number of its last line; one less than ``first`` if it is empty."""
        return self.first + line_count(self.text) - 1


@dataclass(frozen=True)
class Hit:
    """A line that matches a search, split around the match; numbers count from 1."""

    step: int
    line: int
    before: str
    found: str
    after: str


@dataclass(frozen=True)
class SearchResult:
    """Some hits in order. ``count`` lines match; with ``many``, more than that."""

    hits: list[Hit]
    count: int
    many: bool


def line_count(text: str) -> int:
    """How many lines a text has, an unfinished last line included."""
    return text.count("\n") + (text != "" and not text.endswith("\n"))


def tail(template: Template, number: int, size: int, *, until: int | None = None) -> TextSlice:
    """The last ``size`` characters of a step's output, or of its output up to event ``until``."""
    if until is None or finished_by(template, number, until):
        row = template.steps.filter(number=number).values_list(
            Right("output", size), newline_count("output"), Length("output")
        )
        text, lines, length = row.get()
        if length or until is not None:
            return from_line_start(text, lines, length)
    return tail_from_events(template, number, size, until)


def finished_by(template: Template, number: int, seq: int) -> bool:
    """Whether a step was finished at event ``seq``: then its row has its output."""
    return template.events.filter(kind="step_finished", step=number, seq__lte=seq).exists()


def tail_from_events(template: Template, number: int, size: int, until: int | None) -> TextSlice:
    """The same from the events, reading only the last ones."""
    events = template.events.filter(kind="output", step=number)
    if until is not None:
        events = events.filter(seq__lte=until)
    text = Cast(KT("payload__text"), TextField())
    sums = events.annotate(text=text).aggregate(
        lines=Sum(newline_count("text")), size=Sum(Length("text"))
    )
    parts: list[str] = []
    for payload in events.order_by("-seq").values_list("payload", flat=True).iterator(20):
        parts.append(str(payload.get("text", "")))
        if sum(map(len, parts)) >= size:
            break
    end = "".join(reversed(parts))[-size:]
    return from_line_start(end, sums["lines"] or 0, sums["size"] or 0)


def newline_count(field: str) -> CombinedExpression:
    """An expression for the number of line feeds in a column."""
    without = Replace(F(field), Value("\n"), Value(""))
    return Length(field) - Length(without)


def from_line_start(text: str, lines: int, length: int) -> TextSlice:
    """The tail of a text of ``length`` characters and ``lines`` line feeds, from a line's start."""
    first = lines - text.count("\n") + 1
    if len(text) < length:
        end = text.find("\n", 0, MAX_LINE_LENGTH) + 1
        return TextSlice(text[end:], first + bool(end), text[:end])
    return TextSlice(text, first)


def lines(template: Template, number: int, first: int, last: int, at: int) -> TextSlice:
    """Up to ``MAX_LINES`` of the lines ``first`` to ``last`` of a step, around line ``at``.

    Fewer if they are long; a single line that is too long is cut. Raises ``NotFound`` for an
    unknown step.
    """
    text = step_output(template, number)
    rows = text.split("\n")
    if rows[-1] == "":
        rows.pop()
    first, last = max(first, 1), min(last, len(rows))
    if first > last:
        return TextSlice("", first)
    begin = min(max(at - MAX_LINES // 2, first), max(last - MAX_LINES + 1, first))
    end = min(begin + MAX_LINES - 1, last)
    begin, end = narrow_range(rows, begin, end, min(max(at, begin), end))
    shown = "".join(f"{row}\n" for row in rows[begin - 1 : end])
    if len(shown) > MAX_SLICE_CHARS:
        shown = f"{shown[:MAX_SLICE_CHARS]}…\n"
    lead = "\n".join(rows[max(begin - 200, 0) : begin - 1])[-LEAD:]
    return TextSlice(shown, begin, lead)


def narrow_range(rows: list[str], begin: int, end: int, at: int) -> tuple[int, int]:
    """The largest range of lines around ``at`` that fits into ``MAX_SLICE_CHARS``."""
    size, low, high = len(rows[at - 1]), at, at
    while low > begin or high < end:
        down = low > begin and (high == end or at - low <= high - at)
        size += len(rows[low - 2 if down else high]) + 1
        if size > MAX_SLICE_CHARS:
            break
        low, high = (low - 1, high) if down else (low, high + 1)
    return low, high


def step_output(template: Template, number: int) -> str:
    """A step's complete stored output. Raises ``NotFound``."""
    step = template.steps.filter(number=number).first()
    if step is None:
        raise NotFound("This template has no such step.")
    return step.output or output_from_events(template, number)


def search(
    template: Template, query: str, *, after: tuple[int, int] = (0, 0), limit: int = 100
) -> SearchResult:
    """The lines of all steps that contain ``query``, ignoring case and colours.

    At most ``limit`` of them, after line ``after`` (step, line).
    """
    matches = (
        (number, hit)
        for number in template.steps.values_list("number", flat=True)
        for hit in find_lines(plain(step_output(template, number)), query)
    )
    hits: list[Hit] = []
    count = 0
    for number, (line, text) in islice(matches, MAX_COUNTED_HITS):
        count += 1
        if (number, line) > after and len(hits) < limit:
            hits.append(excerpt(number, line, text, query))
    return SearchResult(hits, count, many=next(matches, None) is not None)


def find_lines(text: str, query: str) -> Iterator[tuple[int, str]]:
    """The lines of a text that contain ``query``, with their numbers."""
    lowered, query = text.lower(), query.lower()
    if query not in lowered:
        return
    rows, line, at = text.split("\n"), 1, 0
    while (position := lowered.find(query, at)) >= 0:
        line += lowered.count("\n", at, position)
        yield line, rows[line - 1]
        at = lowered.find("\n", position)
        if at < 0:
            return


def excerpt(step: int, line: int, text: str, query: str) -> Hit:
    """The line, or the part around the match of a long one."""
    at = max(text.lower().find(query.lower()), 0)
    end = at + len(query)
    before, after = text[:at], text[end:]
    if len(before) > EXCERPT_CHARS // 2:
        before = f"…{before[-EXCERPT_CHARS // 2 :].lstrip()}"
    if len(after) > EXCERPT_CHARS:
        after = f"{after[:EXCERPT_CHARS]}…"
    return Hit(step, line, before, text[at:end], after)
