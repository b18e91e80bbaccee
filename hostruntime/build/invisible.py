"""Find characters in a step that are invisible, or that look like others.

A no-break space copied from a web page (U+00A0) joins two words into one, and "pip install: command
not found" does not show it. This covers Unicode's categories Zs, Zl, Zp, Cc and Cf, and the
quotation marks and dashes that word processors substitute for ASCII ones.
"""

from __future__ import annotations

import unicodedata

MAX_NAMED = 3
# These are visible, so they are named but not replaced.
_LOOKALIKES = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u2010\u2011\u2012\u2013\u2014\u2212"
_INVISIBLE_CATEGORIES = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})
_PLAIN_WHITESPACE = " \t\n"


def reveal(text: str) -> str:
    """Replace invisible characters by their code points."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"\u27e8{_code_point(char)}\u27e9" if _is_invisible(char) else char for char in text
    )


def describe_unusual_characters(text: str) -> str:
    """Return a sentence that names and locates unusual characters; empty if there are none."""
    found: dict[str, str] = {}
    for line, words in enumerate(text.split("\n"), 1):
        for column, char in enumerate(words, 1):
            if (_is_invisible(char) or char in _LOOKALIKES) and char not in found:
                found[char] = f"{_describe(char)} (line {line}, character {column})"
    if not found:
        return ""
    named = ", ".join(list(found.values())[:MAX_NAMED])
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return (
        f"The step has {named}{more}. To a shell this is part of a word, not a space, quotation "
        "mark or hyphen; if that isn't what you meant, retype it."
    )


def _is_invisible(char: str) -> bool:
    return char not in _PLAIN_WHITESPACE and unicodedata.category(char) in _INVISIBLE_CATEGORIES


def _describe(char: str) -> str:
    name = unicodedata.name(char, "a control character").lower()
    return (
        f"{_code_point(char)}, {name}" if char not in _LOOKALIKES else f"{char} {_code_point(char)}"
    )


def _code_point(char: str) -> str:
    return f"U+{ord(char):04X}"
