r"""How the console's processes and the agent write their logs: one record cannot pose as two.

Much of what is logged comes from untrusted sources: a path, a name, a broken program's output. In
a record every control character is escaped (``\n``, ``\x1b``), so that it neither starts a new
line nor colours the terminal that shows it (CWE-117, CWE-150); each line of a traceback is marked
as a continuation. Secrets in URLs and headers are redacted.
"""

from __future__ import annotations

import logging
import re

# Starts each further line of a record, and never a record.
CONTINUATION_PREFIX = "    | "
# Control characters, and Unicode's bidirectional controls and line separators (TR 36).
_CONTROL_CHARACTERS = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_SECRETS = (
    # An invitation link, wherever a URL is written, even in another URL's query.
    (re.compile(r"(?i)((?:/|%2f)join(?:/|%2f))[^\s/?%&\\\"'<>]+"), r"\1***"),
    # The row or the key that PostgreSQL rejected: sessions, digests, variables.
    (
        re.compile(
            r"(DETAIL:).*?(?=\n(?:HINT|CONTEXT|QUERY|STATEMENT):|\n\n(?:The above|During) |\Z)",
            re.DOTALL,
        ),
        r"\1 ***",
    ),
    # An API token (orkestr_console.accounts.tokens): its public part stays.
    (re.compile(r"(ork_[A-Za-z0-9]{12}_)[A-Za-z0-9]{8,}"), r"\1***"),
    # Anything sent as a credential, or as part of a database URL.
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}"), r"\1 ***"),
    (re.compile(r"(\b[a-z]+://[^\s:/@]+:)[^\s@/]+(?=@)"), r"\1***"),
)


def escape_controls(text: str) -> str:
    """``text`` with every character that could control a terminal or mislead a reader escaped."""
    return _CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def redact_secrets(text: str) -> str:
    """``text`` with the secrets in URLs and headers replaced."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class LineFormatter(logging.Formatter):
    """``2026-11-23 19:00:00,123 WARNING django.request: Not Found: /x [req_…]``, on one line.

    The request's id is included if the record belongs to a request, so that an id that a person
    quotes can be found.
    """

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The record's first line."""
        record.message = escape_controls(redact_secrets(record.message))
        line = super().formatMessage(record)
        request_id = getattr(getattr(record, "request", None), "request_id", None)
        return f"{line} [{escape_controls(str(request_id))}]" if request_id else line

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        """A traceback, each line marked as a continuation."""
        return mark_continuation(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        """A stack, each line marked as a continuation."""
        return mark_continuation(super().formatStack(stack_info))


def mark_continuation(text: str) -> str:
    """Prefix each line of ``text`` as a continuation of a record."""
    lines = redact_secrets(text).split("\n")
    return "\n".join(f"{CONTINUATION_PREFIX}{escape_controls(line)}" for line in lines)


def handler() -> logging.Handler:
    """A handler that writes to standard error, which the process manager stores as the log."""
    stream = logging.StreamHandler()
    stream.setFormatter(LineFormatter())
    return stream
