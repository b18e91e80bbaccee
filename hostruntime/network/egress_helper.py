"""What Squid asks, per request, about what a container may reach (external_acl_type).

A zip of this module and :mod:`hostruntime.network.policy` is what really runs, as user `proxy`,
under a Python that user may execute; so the standard library alone, and nothing of Python 3.12.

One line in: `<channel> <address> <method> <host> <port> <question>`. One line out:
`<channel> OK tag=<owner>` or `<channel> ERR message=<sentence>`. The questions:

- `decide`: may the address reach that host? A refusal is recorded, and is final.
- `address`: the name resolved to a denied address. Always refused, and recorded.
- `allow`: every check has passed. Recorded.
- `hello`: the tunnel begins with a TLS ClientHello; the word before says for which server.

Whatever cannot be read or understood is refused.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path

from hostruntime.network.policy import DEFAULT_LIST, Verdict, decide, judge_hello

# A container that asks in a loop must not fill the disk: past this its decisions still hold, and
# are recorded no more.
MAX_LOG_BYTES = 4 * 1024 * 1024
# Connections a container may ask for: so many at once, and then so many a second.
BURST = 2000.0
PER_SECOND = 100.0
MAX_BUCKETS = 4096


@dataclass(frozen=True)
class Question:
    """One request of a container, as Squid saw it."""

    address: str
    method: str
    host: str
    port: int
    kind: str
    server_name: str = ""


@dataclass(frozen=True)
class Entry:
    """Who has an address and what it may reach; `domains` None: there is no such entry."""

    owner: str | None
    domains: frozenset[str] | None


def main(arguments: list[str]) -> None:
    """Answer until Squid closes the pipe; `arguments` is the egress directory."""
    directory, rates = Path(arguments[0]), Rates()
    for line in sys.stdin.buffer:
        sys.stdout.write(
            answer(directory, line.decode("utf-8", "replace").rstrip("\r\n"), rates) + "\n"
        )
        sys.stdout.flush()


class Rates:
    """How much of its rate each address has left, as far as this one helper has seen."""

    def __init__(self) -> None:
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, address: str) -> bool:
        """Take one connection; whether there was one."""
        now = time.monotonic()
        left, at = self._left.get(address, (BURST, now))
        left = min(BURST, left + (now - at) * PER_SECOND)
        if len(self._left) > MAX_BUCKETS:
            self._left.clear()
        self._left[address] = (max(0.0, left - 1), now)
        return left >= 1


def answer(directory: Path, line: str, rates: Rates) -> str:
    """Return the reply to one line of Squid's; refuses what it cannot understand."""
    channel, _, rest = line.partition(" ")
    question = parse_question(rest)
    if question is None:
        return f"{channel} ERR message={_quoted('the request could not be understood')}"
    entry = read_entry(directory, question.address)
    verdict = judge(question, entry, rates)
    if not verdict.allowed or question.kind == "allow":
        record(directory, question, entry, verdict)
    if verdict.allowed:
        return f"{channel} OK tag={entry.owner}"
    return f"{channel} ERR message={_quoted(verdict.message)}"


def parse_question(text: str) -> Question | None:
    """Read the five words after the channel; None if they are not that."""
    words = [urllib.parse.unquote(word) for word in text.split(" ")]
    if len(words) < 5 or not words[3].isdigit():
        return None
    server_name = words[4] if len(words) > 5 else ""
    return Question(words[0], words[1], words[2], int(words[3]), words[-1], server_name)


def judge(question: Question, entry: Entry, rates: Rates) -> Verdict:
    """Decide one question."""
    if question.kind == "decide" and not rates.take(question.address):
        text = f"more than {PER_SECOND:.0f} connections a second: wait and try again"
        return Verdict(allowed=False, reason="too_fast", message=text)
    verdict = decide(entry.domains, question.method, question.host, question.port)
    if verdict.allowed and question.kind == "address":
        text = f"{question.host} resolves to an address that no sandbox may reach"
        return Verdict(allowed=False, reason="denied_address", message=text)
    if verdict.allowed and question.kind == "hello":
        return judge_hello(question.host, question.server_name)
    return verdict


def read_entry(directory: Path, address: str) -> Entry:
    """Read who has an address; anything missing or malformed is no entry."""
    if not address.replace(".", "").isdigit():
        return Entry(None, None)
    try:
        entry = json.loads((directory / "entries" / f"{address}.json").read_bytes())
        owner, listed = str(entry["owner"]), entry["domains"]
        if listed is None or DEFAULT_LIST in listed:
            default = json.loads((directory / "defaults.json").read_bytes())["domains"]
            listed = [*default, *(listed or ())]
        return Entry(owner, frozenset(str(domain) for domain in listed))
    except (OSError, ValueError, KeyError, TypeError):
        return Entry(None, None)


def record(directory: Path, question: Question, entry: Entry, verdict: Verdict) -> None:
    """Append the decision to its owner's log; a full disk changes no decision."""
    if entry.owner is None:
        return
    at = {"at": int(time.time() * 1000) / 1000, "owner": entry.owner}
    asked = {**asdict(question), "host": question.host[:255]}
    del asked["kind"], asked["server_name"]
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
