"""What Squid asks, per request, about what a container may reach (external_acl_type).

A zip of this module and :mod:`hostruntime.policy` is what really runs, as user `proxy`, under a
Python that user may execute; so the standard library alone, and nothing of Python 3.12.

One line in: `<channel> <address> <method> <host> <port> <question>`. One line out:
`<channel> OK` or `<channel> ERR message=<sentence>`. The questions:

- `decide`: may the address reach that host? A refusal is recorded, and is final.
- `address`: the name resolved to a denied address. Always refused, and recorded.
- `allow`: every check has passed. Recorded.

Whatever cannot be read or understood is refused.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path

from hostruntime.policy import Verdict, decide

# A container that asks in a loop must not fill the disk: past this its decisions still hold, and
# are recorded no more.
MAX_LOG_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Question:
    """One request of a container, as Squid saw it."""

    address: str
    method: str
    host: str
    port: int
    kind: str


@dataclass(frozen=True)
class Entry:
    """Who has an address and what it may reach; `domains` None: there is no such entry."""

    owner: str | None
    domains: frozenset[str] | None


def main(arguments: list[str]) -> None:
    """Answer until Squid closes the pipe; `arguments` is the egress directory."""
    directory = Path(arguments[0])
    for line in sys.stdin.buffer:
        sys.stdout.write(answer(directory, line.decode("utf-8", "replace").rstrip("\r\n")) + "\n")
        sys.stdout.flush()


def answer(directory: Path, line: str) -> str:
    """Return the reply to one line of Squid's; refuses what it cannot understand."""
    channel, _, rest = line.partition(" ")
    question = parse_question(rest)
    if question is None:
        return f"{channel} ERR message={_quoted('the request could not be understood')}"
    entry = read_entry(directory, question.address)
    verdict = judge(question, entry)
    if not verdict.allowed or question.kind == "allow":
        record(directory, question, entry, verdict)
    if verdict.allowed:
        return f"{channel} OK"
    return f"{channel} ERR message={_quoted(verdict.message)}"


def parse_question(text: str) -> Question | None:
    """Read the five words after the channel; None if they are not that."""
    words = [urllib.parse.unquote(word) for word in text.split(" ")]
    if len(words) < 5 or not words[3].isdigit():
        return None
    return Question(words[0], words[1], words[2], int(words[3]), words[4])


def judge(question: Question, entry: Entry) -> Verdict:
    """Decide one question."""
    verdict = decide(entry.domains, question.method, question.host, question.port)
    if verdict.allowed and question.kind == "address":
        text = f"{question.host} resolves to an address that no sandbox may reach"
        return Verdict(allowed=False, reason="denied_address", message=text)
    return verdict


def read_entry(directory: Path, address: str) -> Entry:
    """Read who has an address; anything missing or malformed is no entry."""
    if not address.replace(".", "").isdigit():
        return Entry(None, None)
    try:
        entry = json.loads((directory / "entries" / f"{address}.json").read_bytes())
        owner, listed = str(entry["owner"]), entry["domains"]
        if listed is None:
            listed = json.loads((directory / "defaults.json").read_bytes())["domains"]
        return Entry(owner, frozenset(str(domain) for domain in listed))
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(None, None)


def record(directory: Path, question: Question, entry: Entry, verdict: Verdict) -> None:
    """Append the decision to its owner's log; a full disk changes no decision."""
    if entry.owner is None:
        return
    at = {"at": round(time.time(), 3), "owner": entry.owner}
    asked = {**asdict(question), "host": question.host[:255]}
    del asked["kind"]
    said = {"verdict": "allowed" if verdict.allowed else "refused", "reason": verdict.reason}
    line = json.dumps({**at, **asked, **said, "message": verdict.message}) + "\n"
    try:
        with (directory / "decisions" / f"{entry.owner}.ndjson").open("a") as log:
            if log.tell() < MAX_LOG_BYTES:
                log.write(line)
    except OSError as error:
        sys.stderr.write(f"a decision could not be recorded: {error}\n")


def _quoted(text: str) -> str:
    # Squid unescapes a quoted value by the rules of shell_escape; it wants no control characters.
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    main(sys.argv[1:])
