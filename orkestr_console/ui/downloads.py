"""Tables and records as downloads that are safe to open.

CSV (RFC 4180): a spreadsheet treats a cell that starts with ``=`` and the like as a formula, which
can send the sheet elsewhere or start programs (OWASP, "CSV Injection"). Such a cell gets a leading
apostrophe, and so does one that already starts with an apostrophe: removing one leading apostrophe
from every cell that has one restores the original. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from typing import Any

from django.http import HttpResponse

from orkestr_console.core.text import escape_invisible

# OWASP's list, the full-width forms that some locales treat alike, and our own apostrophe.
FORMULA_PREFIXES = (
    "=",
    "+",
    "-",
    "@",
    "\t",
    "\r",
    "\n",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
    "'",
)


def csv_file(
    name: str, columns: Iterable[str], rows: Iterable[Iterable[int | float | str]]
) -> HttpResponse:
    """A table as a download called ``name``, which is ASCII without quotation marks."""
    response = attachment(name, "text/csv; charset=utf-8")
    writer = csv.writer(response)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([safe_cell(value) for value in row])
    return response


def json_lines_file(name: str, records: Iterable[Mapping[str, Any]]) -> HttpResponse:
    """One object per line, in ASCII, so that nothing ends a line (U+2028) or affects a terminal.

    JSON readers restore every character (RFC 8259, section 7).
    """
    response = attachment(name, "application/x-ndjson")
    for record in records:
        response.write(json.dumps(record, ensure_ascii=True) + "\n")
    return response


def attachment(name: str, content_type: str) -> HttpResponse:
    """An empty response that browsers save rather than show."""
    response = HttpResponse(content_type=content_type)
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def safe_cell(value: float | str) -> float | str:
    """A value that is safe in spreadsheets and terminals."""
    if not isinstance(value, str):
        return value
    return (
        f"'{escape_invisible(value)}"
        if value.lstrip(" ").startswith(FORMULA_PREFIXES)
        else escape_invisible(value)
    )
