"""Which strings can be stored, which are safe as names, and how others are displayed.

A leaf module. Characters that affect the text around them (a right-to-left override, a cursor
movement) or are invisible (a zero-width space, a tag character) make one name look like another:
Unicode TR 36 and TR 55, CVE-2021-42574. Names must have none; in other text they are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Zero-width joiner and non-joiner: emoji and Persian need them, between letters that are not ASCII.
JOINERS = "\u200c\u200d"
# Unicode's controls and default ignorables, and its two line separators; not tab and line feed,
# which are allowed in text but not in names.
_INVISIBLE_CHARACTERS = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u00ad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
INVISIBLE = re.compile(
    f"[{_INVISIBLE_CHARACTERS}]|(?<![^\x00-\x7f])[{JOINERS}]|[{JOINERS}](?![^\x00-\x7f])"
)

# Control sequences of ECMA-48: CSI; strings such as OSC, up to BEL, ST or the line's end; others.
_ESCAPES = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])"
)
# A CR that a message quotes ("set: -\\r: invalid option") overwrites nothing; it is the error.
_QUOTED_CR = re.compile("\r(?=[:'\"\u2019\u201d])")
_SHOWN_CR = "\u27e8U+000D\u27e9"


def storage_problem(text: str) -> str | None:
    """Why ``text`` cannot be stored or forwarded, as the end of a sentence; None if it can.

    PostgreSQL's ``text`` cannot hold NUL, and a lone surrogate has no UTF-8 encoding (RFC 3629).
    """
    if (at := text.find("\0")) >= 0:
        return f"must not contain NUL characters; take out \\0, {position_text(text, at)}."
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate, where = f"\\u{ord(text[error.start]):04x}", position_text(text, error.start)
        return f"must not contain half of a surrogate pair; take out {surrogate}, {where}."
    return None


def position_text(text: str, index: int) -> str:
    """The position of ``text[index]`` in words: ``character 5``, ``line 2, character 5``."""
    line, begin = text.count("\n", 0, index) + 1, text.rfind("\n", 0, index) + 1
    character = f"character {index - begin + 1}"
    return f"line {line}, {character}" if "\n" in text else character


def name_problem(name: str) -> str | None:
    """Why ``name`` is not a valid name, as the end of a sentence; None if it is."""
    match = INVISIBLE.search(name) or re.search(r"[\t\n]", name)
    if match is None:
        return storage_problem(name)
    return (
        "must not contain control, invisible or text-direction characters; "
        f"take out {code_point(match[0])}, character {match.start() + 1}."
    )


def readable(name: str) -> str:
    """A validator for names. Raises ``ValueError`` for an invalid one."""
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


def escape_invisible(text: str) -> str:
    """``text`` with invisible and text-direction characters written as their code points."""
    return INVISIBLE.sub(lambda found: f"\u27e8{code_point(found[0])}\u27e9", text)


def code_point(character: str) -> str:
    """``U+202E``."""
    return f"U+{ord(character):04X}"


def replace_unstorable(text: str) -> str:
    """``text`` with replacement characters for what cannot be stored."""
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()


def plain(text: str) -> str:
    """A program's output without colours; of overwritten lines only the last state."""
    lines = _QUOTED_CR.sub(_SHOWN_CR, _ESCAPES.sub("", text)).split("\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def shorten_list(names: Sequence[str], limit: int = 5) -> str:
    """The first names, and the number of the rest: ``a, b and 3 more``."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
