"""Lists, newest first, a page at a time: keyset paging behind a signed, opaque cursor."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core import signing
from django.db import models
from django.db.models import Q

from orkestr_console.core.errors import InvalidInput

USUAL_LIMIT = 50
HIGHEST_LIMIT = 200
_SALT = "orkestr.cursor"


def page[R: models.Model](
    rows: models.QuerySet[R], limit: int | None, cursor: str | None
) -> tuple[list[R], str | None]:
    """The newest ``limit`` rows after ``cursor``, and the cursor of the next page or None.

    Raises ``InvalidInput`` for a cursor that is not one of ours. A limit past the server's own is
    lowered to it.
    """
    limit = min(limit or USUAL_LIMIT, HIGHEST_LIMIT)
    if cursor:
        at, pk = _read(cursor)
        rows = rows.filter(Q(created_at__lt=at) | Q(created_at=at, pk__lt=pk))
    found = list(rows.order_by("-created_at", "-pk")[: limit + 1])
    following = _write(found[limit - 1]) if len(found) > limit else None
    return found[:limit], following


def read_limit(text: str | None) -> int | None:
    """The ``limit`` of a query string. Raises ``InvalidInput`` unless a positive whole number."""
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0):
        raise InvalidInput(
            f"limit: must be a whole number from 1 to {HIGHEST_LIMIT}.",
            fields={"limit": f"must be a whole number from 1 to {HIGHEST_LIMIT}."},
        )
    return int(text)


def _write(row: Any) -> str:
    return signing.dumps([row.created_at.isoformat(), row.pk], salt=_SALT)


def _read(cursor: str) -> tuple[datetime, str]:
    try:
        at, pk = signing.loads(cursor, salt=_SALT)
        return datetime.fromisoformat(at), str(pk)
    except (signing.BadSignature, ValueError, TypeError):
        raise InvalidInput(
            "cursor: is not one this server gave; leave it out to start from the newest.",
            fields={"cursor": "is not one this server gave."},
        ) from None
