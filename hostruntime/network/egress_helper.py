"""Squid's helper, which decides for each request what a container may reach (external_acl_type).

It runs from a zip of this module and :mod:`hostruntime.network.policy`, as user `proxy`, under any
Python that user can execute; so it uses the standard library only, and no Python 3.12 features.

One line in: `<channel> <address> <method> <host> <port> <kind>`. One line out:
`<channel> OK tag=<owner>` or `<channel> ERR message=<sentence>`. The kinds:

- `decide`: may the address reach that host? A refusal is recorded, and is final.
- `address`: the name resolved to a denied address. Always refused, and recorded.
- `allow`: every check has passed. Recorded.
- `hello`: the tunnel begins with a TLS ClientHello; the word before `hello` is the server name.

Anything that cannot be read or parsed is refused.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.parse
from dataclasses import asdict, dataclass
from pathlib import Path

from hostruntime.network.policy import DEFAULT_LIST, Verdict, check_hello, decide

# A container that sends requests in a loop must not fill the disk: beyond this size, decisions
# still apply but are no longer recorded.
MAX_LOG_BYTES = 4 * 1024 * 1024
# The rate of a container's connections: a burst, then so many per second.
BURST = 2000.0
PER_SECOND = 100.0
MAX_BUCKETS = 4096


@dataclass(frozen=True)
class Request:
    """One request of a container, as seen by Squid."""

    address: str
    method: str
    host: str
    port: int
    kind: str
    server_name: str = ""


@dataclass(frozen=True)
class Entry:
    """The owner of an address and what it may reach; `domains` is None without an entry."""

    owner: str | None
    domains: frozenset[str] | None


def main(arguments: list[str]) -> None:
    """Answer requests until Squid closes the pipe; `arguments` is the egress directory."""
    directory, limiter = Path(arguments[0]), RateLimiter()
    for line in sys.stdin.buffer:
        sys.stdout.write(
            answer(directory, line.decode("utf-8", "replace").rstrip("\r\n"), limiter) + "\n"
        )
        sys.stdout.flush()


class RateLimiter:
    """A token bucket for each address, as far as this helper process has seen."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}

    def allow(self, address: str) -> bool:
        """Take a token for one connection; return whether there was one."""
        now = time.monotonic()
        tokens, at = self._buckets.get(address, (BURST, now))
        tokens = min(BURST, tokens + (now - at) * PER_SECOND)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.clear()
        self._buckets[address] = (max(0.0, tokens - 1), now)
        return tokens >= 1


def answer(directory: Path, line: str, limiter: RateLimiter) -> str:
    """Return the reply to one line from Squid; refuses what it cannot parse."""
    channel, _, rest = line.partition(" ")
    request = parse_request(rest)
    if request is None:
        return f"{channel} ERR message={_quoted('the request could not be understood')}"
    entry = read_entry(directory, request.address)
    verdict = judge(request, entry, limiter)
    if not verdict.allowed or request.kind == "allow":
        record(directory, request, entry, verdict)
    if verdict.allowed:
        return f"{channel} OK tag={entry.owner}"
    return f"{channel} ERR message={_quoted(verdict.message)}"


def parse_request(text: str) -> Request | None:
    """Parse the words after the channel; None if they are malformed."""
    words = [urllib.parse.unquote(word) for word in text.split(" ")]
    if len(words) < 5 or not words[3].isdigit():
        return None
    server_name = words[4] if len(words) > 5 else ""
    return Request(words[0], words[1], words[2], int(words[3]), words[-1], server_name)


def judge(request: Request, entry: Entry, limiter: RateLimiter) -> Verdict:
    """Decide one request."""
    if request.kind == "decide" and not limiter.allow(request.address):
        text = f"more than {PER_SECOND:.0f} connections a second: wait and try again"
        return Verdict(allowed=False, reason="too_fast", message=text)
    verdict = decide(entry.domains, request.method, request.host, request.port)
    if verdict.allowed and request.kind == "address":
        text = f"{request.host} resolves to an address that no sandbox may reach"
        return Verdict(allowed=False, reason="denied_address", message=text)
    if verdict.allowed and request.kind == "hello":
        return check_hello(request.host, request.server_name)
    return verdict


def read_entry(directory: Path, address: str) -> Entry:
    """Read the entry of an address; empty if anything is missing or malformed."""
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


def record(directory: Path, request: Request, entry: Entry, verdict: Verdict) -> None:
    """Append the decision to its owner's log; a full disk does not change the decision."""
    if entry.owner is None:
        return
    at = {"at": int(time.time() * 1000) / 1000, "owner": entry.owner}
    requested = {**asdict(request), "host": request.host[:255]}
    del requested["kind"], requested["server_name"]
    decision = {"verdict": "allowed" if verdict.allowed else "refused", "reason": verdict.reason}
    line = json.dumps({**at, **requested, **decision, "message": verdict.message}) + "\n"
    try:
        with (directory / "decisions" / f"{entry.owner}.ndjson").open("a") as log:
            if log.tell() < MAX_LOG_BYTES:
                log.write(line)
    except OSError as error:
        sys.stderr.write(f"a decision could not be recorded: {error}\n")


def _quoted(text: str) -> str:
    # Squid unescapes a quoted value by the rules of shell_escape; control characters are invalid.
    plain = "".join(char if " " <= char <= "~" else "?" for char in text)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    main(sys.argv[1:])
