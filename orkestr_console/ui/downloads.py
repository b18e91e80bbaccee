"""Tables and records as files to be saved: what opens them computes and obeys nothing in them.

CSV (RFC 4180): a spreadsheet takes a cell that begins with ``=`` and the like for a formula, which
can send the sheet elsewhere or start programs (OWASP, "CSV Injection"). Such a cell gets an
apostrophe before it, and so does one that begins with an apostrophe: who takes one leading
apostrophe off every cell that has one has exactly what was there. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from typing import Any

from django.http import HttpResponse

from orkestr_console.core.text import escape_invisible

# OWASP's list, the full-width forms that some locales read alike, and our own mark.
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
    """A table, to be saved as ``name``, which is ASCII without quotation marks."""
    response = attachment(name, "text/csv; charset=utf-8")
    writer = csv.writer(response)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([safe_cell(value) for value in row])
    return response


def json_lines_file(name: str, records: Iterable[Mapping[str, Any]]) -> HttpResponse:
    """An object a line. All ASCII, so that nothing in it ends a line (U+2028) or steers a terminal.

    JSON readers get every character back (RFC 8259, section 7).
    """
    response = attachment(name, "application/x-ndjson")
    for record in records:
        response.write(json.dumps(record, ensure_ascii=True) + "\n")
    return response


def attachment(name: str, content_type: str) -> HttpResponse:
    """An empty file that browsers save and do not show."""
    response = HttpResponse(content_type=content_type)
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return response


def safe_cell(value: float | str) -> float | str:
    """A value that no spreadsheet computes and no terminal obeys."""
    if not isinstance(value, str):
        return value
    return (
        f"'{escape_invisible(value)}"
        if value.lstrip(" ").startswith(FORMULA_PREFIXES)
        else escape_invisible(value)
    )
