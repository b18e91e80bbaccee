"""What Squid said before it ended, the telling lines first."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Day, time and kid, as cache.log begins its lines.
_HEAD = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d( kid\d+)?\| ?")
# Said at every start and every end.
_NOISE = re.compile(
    r"^$|^(Starting Squid|Service Name|Startup:|Initializ|Processing |Using |Adding |Closing "
    r"|Requiring |Not requiring|CPU Usage|Maximum Resident|Page faults"
    r"|SECURITY NOTICE|advisory: )|: Terminated abnormally"
)
_LIMIT = 1000


def telling_lines(log: str) -> str:
    """The end of a log in one line: what was fatal, then errors and the like, then warnings.

    Each line once, however often Squid tried again.
    """
    said = dict.fromkeys(_HEAD.sub("", line).strip() for line in _whole(log))
    lines = [line for line in said if not _NOISE.search(line)]
    fatal = [line for line in lines if "FATAL" in line]
    warnings = [line for line in lines if line.startswith("WARNING")]
    other = [line for line in lines if line not in fatal and line not in warnings]
    return " ".join(_fitting([*reversed(fatal), *reversed(other), *reversed(warnings)]))


def _whole(log: str) -> Iterable[str]:
    """The lines, each with what Squid 6 has written below it, indented."""
    return re.sub(r"\n +", " ", log).splitlines()


def _fitting(lines: Iterable[str]) -> Iterable[str]:
    left = _LIMIT
    for line in lines:
        if left <= 0:
            return
        yield line[:left]
        left -= len(line) + 1
