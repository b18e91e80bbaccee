r"""How the console's processes and the agent write their logs: a record cannot pretend to be two.

Much of what is logged was written by strangers: a path, a name, what a broken program said. In a
record every control character is written as an escape (``\n``, ``\x1b``), so that it neither
begins a line of its own nor colours the terminal that shows it (CWE-117, CWE-150); the lines of a
traceback are each marked as belonging to what is above. Secrets that an address or a header may
carry are left out.
"""

from __future__ import annotations

import logging
import re

# What begins each further line of a record; none begins a record.
CONTINUED = "    | "
# Controls, and what turns the direction of text or ends a line in Unicode's eyes (TR 36).
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_SECRETS = (
    # The link of an invitation, wherever an address is written, be it in another's query.
    (re.compile(r"(?i)((?:/|%2f)join(?:/|%2f))[^\s/?%&\\\"'<>]+"), r"\1***"),
    # The whole row that PostgreSQL refused, or the key: sessions, digests, variables.
    (
        re.compile(
            r"(DETAIL:).*?(?=\n(?:HINT|CONTEXT|QUERY|STATEMENT):|\n\n(?:The above|During) |\Z)",
            re.DOTALL,
        ),
        r"\1 ***",
    ),
    # An API token (orkestr_console.accounts.tokens): its public part stays.
    (re.compile(r"(ork_[A-Za-z0-9]{12}_)[A-Za-z0-9]{8,}"), r"\1***"),
    # Anything sent as a credential, or as part of a database's address.
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}"), r"\1 ***"),
    (re.compile(r"(\b[a-z]+://[^\s:/@]+:)[^\s@/]+(?=@)"), r"\1***"),
)


def one_line(text: str) -> str:
    """``text`` with every character that could steer a terminal or a reader as an escape."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def without_secrets(text: str) -> str:
    """``text`` without the secrets that an address or a header carries."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class LineFormatter(logging.Formatter):
    """``2026-11-23 19:00:00,123 WARNING django.request: Not Found: /x [req_…]``, in one line.

    The request's id is there where the record came with a request, so that what a person quotes
    can be found.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's first line."""
        record.message = one_line(without_secrets(record.message))
        line = super().formatMessage(record)
        known = getattr(getattr(record, "request", None), "request_id", None)
        return f"{line} [{one_line(str(known))}]" if known else line

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        """A traceback, each line of which says that it is one's continuation."""
        return continued(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        """The same for a stack."""
        return continued(super().formatStack(stack_info))


def continued(text: str) -> str:
    """Lines as the further lines of a record."""
    lines = without_secrets(text).split("\n")
    return "\n".join(f"{CONTINUED}{one_line(line)}" for line in lines)


def handler() -> logging.Handler:
    """Writes records to standard error, which the process manager keeps as the log."""
    stream = logging.StreamHandler()
    stream.setFormatter(LineFormatter())
    return stream
