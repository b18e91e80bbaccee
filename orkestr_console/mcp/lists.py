"""Lists that fit into an agent's context: what is in use first, and then the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from orkestr_console.http.paging import cursor_after
from orkestr_console.mcp.schema import CHARACTERS_PER_TOKEN, MAX_LIST_TOKENS, compact

# Some of the budget is for what is around the rows.
MAX_CHARACTERS = (MAX_LIST_TOKENS - 150) * CHARACTERS_PER_TOKEN
DEFAULT_ROWS = 20
# The two parts of a list, in the order of their pages.
LIVE, ENDED = "live", "ended"

type Row = dict[str, Any]
type ReadPage[R] = Callable[[bool, int, str | None], Awaitable[tuple[list[R], str | None]]]


def fitting(rows: Iterable[Row], most: int = MAX_CHARACTERS) -> list[Row]:
    """As many of the rows as fit; always the first."""
    shown: list[Row] = []
    for row in rows:
        most -= len(compact(row)) + 1
        if most < 0 and shown:
            break
        shown.append(row)
    return shown


async def live_first[R](
    read_page: ReadPage[R],
    describe: Callable[[list[R]], Awaitable[list[Row]]],
    limit: int | None,
    cursor: str | None,
) -> tuple[list[Row], str | None]:
    """A page of rows: live ones before the others, each newest first, as many as fit.

    ``read_page`` reads one part, of what is live or not. Raises ``InvalidInput`` for a cursor that
    is not one of ours.
    """
    limit = limit or DEFAULT_ROWS
    part, after = parse(cursor)
    shown: list[Row] = []
    room = MAX_CHARACTERS
    while True:
        found, following = await read_page(part == LIVE, limit - len(shown), after)
        rows = fitting(await describe(found), room)
        room -= sum(len(compact(row)) + 1 for row in rows)
        if shown and room < 0:
            # Not even the first one fits, which the next page begins with.
            return shown, f"{part}:{after or ''}"
        shown += rows
        if len(rows) < len(found):
            return shown, f"{part}:{cursor_after(found[len(rows) - 1])}"
        if following is not None:
            return shown, f"{part}:{following}"
        if part == ENDED:
            return shown, None
        part, after = ENDED, None
        if len(shown) >= limit:
            return shown, f"{ENDED}:"


def parse(cursor: str | None) -> tuple[str, str | None]:
    """The part of the list where a page begins, and the cursor within."""
    part, separator, after = (cursor or f"{LIVE}:").partition(":")
    if not separator or part not in {LIVE, ENDED}:
        return LIVE, cursor
    return part, after or None
