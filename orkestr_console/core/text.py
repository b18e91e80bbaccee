"""Which strings can be stored, which are names a person can trust, and how the rest is shown.

A leaf module. Text that steers what stands around it (a right-to-left override, a cursor movement)
or that is there unseen (a zero-width space, a tag character) makes one name look like another:
Unicode TR 36 and TR 55, CVE-2021-42574. A name must have none of it; anything else is shown with
the character made visible.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Zero-width joiner and non-joiner: emoji and Persian need them, between letters that are not ASCII.
JOINERS = "\u200c\u200d"
# Unicode's controls and default ignorables, and the two separators that end a line; not tab and
# line feed, which text may have and names may not.
_UNSEEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
STEERING = re.compile(f"[{_UNSEEN}]|(?<![^\x00-\x7f])[{JOINERS}]|[{JOINERS}](?![^\x00-\x7f])")

# Control sequences of ECMA-48: CSI; strings such as OSC, up to BEL, ST or the line's end; others.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
)
# A CR that a message quotes ("set: -\\r: invalid option") draws nothing over; it is what was wrong.
_QUOTED_CR = re.compile("\r(?=[:'\"\u2019\u201d])")
_SHOWN_CR = "\u27e8U+000D\u27e9"


def unusable(text: str) -> str | None:
    """Why ``text`` can be neither stored nor sent on, as the end of a sentence; None if it can.

    PostgreSQL's ``text`` holds no NUL, and half of a surrogate pair has no UTF-8 (RFC 3629).
    """
    if (at := text.find("\0")) >= 0:
        return f"must not contain NUL characters; take out \\0, {place(text, at)}."
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half, where = f"\\u{ord(text[error.start]):04x}", place(text, error.start)
        return f"must not contain half of a surrogate pair; take out {half}, {where}."
    return None


def place(text: str, index: int) -> str:
    """Where ``text[index]`` is, as people count: ``character 5``, ``line 2, character 5``."""
    line, begin = text.count("\n", 0, index) + 1, text.rfind("\n", 0, index) + 1
    character = f"character {index - begin + 1}"
    return f"line {line}, {character}" if "\n" in text else character


def unreadable(name: str) -> str | None:
    """Why ``name`` can be no name, as the end of a sentence; None if it can."""
    found = STEERING.search(name) or re.search(r"[\t\n]", name)
    if found is None:
        return unusable(name)
    return (
        "must not contain control, invisible or text-direction characters; "
        f"take out {code_point(found[0])}, character {found.start() + 1}."
    )


def readable(name: str) -> str:
    """``name``, for a spec to validate with. Raises ``ValueError`` if it can be no name."""
    if problem := unreadable(name):
        raise ValueError(problem)
    return name


def visible(text: str) -> str:
    """``text`` with what would steer it, or be there unseen, written as its code point."""
    return STEERING.sub(lambda found: f"\u27e8{code_point(found[0])}\u27e9", text)


def code_point(character: str) -> str:
    """``U+202E``."""
    return f"U+{ord(character):04X}"


def clean(text: str) -> str:
    """``text`` with a replacement character for whatever cannot be stored."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def plain(text: str) -> str:
    """A program's output without colours, and of lines drawn over again the last state."""
    lines = _QUOTED_CR.sub(_SHOWN_CR, _ESCAPES.sub("", text)).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are: ``a, b and 3 more``."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
