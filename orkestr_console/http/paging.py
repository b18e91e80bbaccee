"""Paged lists, newest first: keyset paging behind a signed, opaque cursor."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core import signing
from django.db import models
from django.db.models import Q

from orkestr_console.core.errors import InvalidInput

DEFAULT_LIMIT = 50
MAX_LIMIT = 200
_SALT = "orkestr.cursor"


def page[R: models.Model](
    rows: models.QuerySet[R], limit: int | None, cursor: str | None
) -> tuple[list[R], str | None]:
    """The newest ``limit`` rows after ``cursor``, and the cursor of the next page or None.

    Raises ``InvalidInput`` for a cursor that is not one of ours. A limit above the server's own is
    lowered to it.
    """
    limit = min(limit or DEFAULT_LIMIT, MAX_LIMIT)
    if cursor:
        at, pk = _decode_cursor(cursor)
        rows = rows.filter(Q(created_at__lt=at) | Q(created_at=at, pk__lt=pk))
    newest = list(rows.order_by("-created_at", "-pk")[: limit + 1])
    next_cursor = cursor_after(newest[limit - 1]) if len(newest) > limit else None
    return newest[:limit], next_cursor


def read_limit(text: str | None) -> int | None:
    """The ``limit`` of a query string. Raises ``InvalidInput`` unless a positive whole number."""
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0):
        raise InvalidInput(
            f"limit: must be a whole number from 1 to {MAX_LIMIT}.",
            fields={"limit": f"must be a whole number from 1 to {MAX_LIMIT}."},
        )
    return int(text)


def cursor_after(row: Any) -> str:
    """The cursor of what comes after a row."""
    return signing.dumps([row.created_at.isoformat(), row.pk], salt=_SALT)


def _decode_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        at, pk = signing.loads(cursor, salt=_SALT)
        return datetime.fromisoformat(at), str(pk)
    except (signing.BadSignature, ValueError, TypeError):
        raise InvalidInput(
            "cursor: is not one this server gave; leave it out to start from the newest.",
            fields={"cursor": "is not one this server gave."},
        ) from None
