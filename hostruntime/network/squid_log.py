"""Summarize Squid's cache.log after it exited, the most relevant lines first."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The date, time and worker that start each line of cache.log.
_LINE_PREFIX = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d( kid\d+)?\| ?")
# Logged at every start and exit.
_NOISE = re.compile(
    r"^$|^(Starting Squid|Service Name|Startup:|Initializ|Processing |Using |Adding |Closing "
    r"|Requiring |Not requiring|CPU Usage|Maximum Resident|Page faults"
    r"|SECURITY NOTICE|advisory: )|: Terminated abnormally"
)
_LIMIT = 1000


def error_summary(log: str) -> str:
    """Summarize a log in one line: fatal errors, then other lines, then warnings, latest first.

    Repeated lines appear once.
    """
    unique = dict.fromkeys(_LINE_PREFIX.sub("", line).strip() for line in _joined_lines(log))
    lines = [line for line in unique if not _NOISE.search(line)]
    fatal = [line for line in lines if "FATAL" in line]
    warnings = [line for line in lines if line.startswith("WARNING")]
    other = [line for line in lines if line not in fatal and line not in warnings]
    return " ".join(_truncated([*reversed(fatal), *reversed(other), *reversed(warnings)]))


def _joined_lines(log: str) -> Iterable[str]:
    """Return the lines, each joined with the indented lines that Squid 6 writes below it."""
    return re.sub(r"\n +", " ", log).splitlines()


def _truncated(lines: Iterable[str]) -> Iterable[str]:
    remaining = _LIMIT
    for line in lines:
        if remaining <= 0:
            return
        yield line[:remaining]
        remaining -= len(line) + 1
