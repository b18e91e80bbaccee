"""Characters of a step that cannot be seen, or that look like others: shown, named and placed.

A blank copied from a web page (U+00A0) makes a word of two, and "pip install: command not found"
does not show it.  What it stands for: Unicode's Zs, Cc and Cf, and the quotation marks and dashes
that word processors put in place of the shell's.
"""

from __future__ import annotations

import unicodedata

MOST_NAMED = 3
# These are seen, so they are named alone.
_LOOK_ALIKE = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u2010\u2011\u2012\u2013\u2014\u2212"
_HIDDEN = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
_PLAIN = " \t\n"


def shown(text: str) -> str:
    """``text`` with what cannot be seen written as its code point."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(f"\u27e8{_code_point(one)}\u27e9" if _is_hidden(one) else one for one in text)


def odd_characters(text: str) -> str:
    """A sentence that names and places them; blank without any."""
    found: dict[str, str] = {}
    for line, words in enumerate(text.split("\n"), 1):
        for column, one in enumerate(words, 1):
            if (_is_hidden(one) or one in _LOOK_ALIKE) and one not in found:
                found[one] = f"{_named(one)} (line {line}, character {column})"
    if not found:
        return ""
    named = ", ".join(list(found.values())[:MOST_NAMED])
    more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    return (
        f"The step has {named}{more}. To a shell this is part of a word, not a space, quotation "
        "mark or hyphen; if that isn't what you meant, retype it."
    )


def _is_hidden(one: str) -> bool:
    return one not in _PLAIN and unicodedata.category(one) in _HIDDEN


def _named(one: str) -> str:
    name = unicodedata.name(one, "a control character").lower()
    return f"{_code_point(one)}, {name}" if one not in _LOOK_ALIKE else f"{one} {_code_point(one)}"


def _code_point(one: str) -> str:
    return f"U+{ord(one):04X}"
