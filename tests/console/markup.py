"""What a page says, whatever the lines of its template are."""

from __future__ import annotations

import re
from typing import Any

# Where line breaks are a person's or a program's, and not the template's.
AS_WRITTEN = re.compile(
    r"(<(?:pre|textarea)\b.*?</(?:pre|textarea)>"
    r"|<span class=\"lines.*?(?=<span class=\"tail|</div>)"
    r"|data-copy=\"[^\"]*\")",
    re.DOTALL,
)


def tight(answer: Any) -> str:
    """A response's text; HTML (or a string of it) without line breaks between its elements.

    A break beside a tag goes with the indentation after it; any other is a space.
    """
    if not isinstance(answer, str):
        if not answer["Content-Type"].startswith("text/html"):
            return str(answer.content.decode())
        answer = answer.content.decode()
    pieces = AS_WRITTEN.split(answer)
    pieces[::2] = [_tight(piece) for piece in pieces[::2]]
    return "".join(pieces)


def _tight(html: str) -> str:
    html = re.sub(r">\n\s*", ">", re.sub(r"\n\s*(?=</|<\w|$)", "", html))
    return re.sub(r"\s+>", ">", re.sub(r"\s*\n\s*", " ", html))
