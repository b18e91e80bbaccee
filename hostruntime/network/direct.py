"""Record the requests of a container that bypass the proxy in its owner's log.

These are DNS queries to its resolver (:mod:`hostruntime.network.stub_resolver`), recorded as
refused if the policy does not allow the host, and otherwise as a mistake of the program, which
should use the proxy. And direct connection attempts to addresses, as seen by the firewall, or with
network `off` by its own namespace (:mod:`hostruntime.network.blackhole`).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hostruntime.host.rundir import RunDir
from hostruntime.network.egress_helper import read_entry
from hostruntime.network.firewall import Attempt
from hostruntime.network.policy import Mode, Verdict, canonical_host, matches

MAX_LOG_BYTES = 1024 * 1024
# How to make any program use the proxy.
ADVICE = (
    "its program asked DNS for it, past the proxy: give the program the address in $HTTPS_PROXY, "
    "in its environment or as a proxy setting of its own"
)
# The service labels before the host (RFC 2782): _hkps._tcp.keys.example.
_SERVICE = re.compile(r"^(?:_[^.]+\.)+")
# Names that are never external hosts (RFC 6761, RFC 6762), and reverse lookups.
_LOCAL = frozenset({"arpa", "local", "localhost"})
_POLICY_CACHE_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass
class QueryRecorder:
    """Records the DNS queries of one slot's container; for use in one thread.

    ``owner`` returns the slot's current owner, if any.
    """

    run_dir: RunDir
    mode: Mode
    address: str | None
    owner: Callable[[], str | None]
    _domains: frozenset[str] = field(default_factory=frozenset)
    _read_at: float = float("-inf")

    def record(self, name: str) -> None:
        """Record a query if it is for an external host."""
        host = queried_host(name)
        owner = self.owner()
        if host is None or owner is None:
            return
        verdict = judge_query(self.mode, self._allowlist(), host)
        # A DNS query has no port.
        what = (self.address or "", "DNS", host, 0)
        _append(self.run_dir, owner, what, verdict, at=time.time())

    def _allowlist(self) -> frozenset[str]:
        now = time.monotonic()
        if self.address is not None and now - self._read_at > _POLICY_CACHE_SECONDS:
            entry = read_entry(self.run_dir.egress, self.address)
            self._domains, self._read_at = entry.domains or frozenset(), now
        return self._domains


def queried_host(name: str) -> str | None:
    """Return the canonical host of a DNS query; None if it is not an external host."""
    host = canonical_host(_SERVICE.sub("", name))
    if host is None or "." not in host or host.rpartition(".")[2] in _LOCAL:
        return None
    return host


def judge_query(mode: Mode, domains: frozenset[str], host: str) -> Verdict:
    """Return the verdict on a host that was looked up by DNS."""
    if mode == "off":
        return _network_off(f"{host} was asked for")
    if matches(host, domains) is None:
        text = (
            f"{host} is not on its allowlist, and {ADVICE}, and add the host to allow_domains; "
            "or use network open"
        )
        return Verdict(allowed=False, reason="not_listed", message=text)
    text = f"{host} is allowed, but through the proxy alone, and {ADVICE}"
    return Verdict(allowed=True, reason="past_proxy", message=text)


def record_attempt(run_dir: RunDir, owner: str, mode: Mode, attempt: Attempt) -> None:
    """Record a direct connection attempt of an owner's container."""
    kind, where = attempt.protocol.upper(), f"{attempt.address}:{attempt.port}"
    if mode == "off":
        source, verdict = "", _network_off(f"{kind} to {where} was tried")
    else:
        source, verdict = attempt.source, _bypassed_proxy(f"{kind} to {where}")
    what = (source, kind, attempt.address, attempt.port)
    _append(run_dir, owner, what, verdict, at=time.time() - attempt.age_seconds)


def _network_off(what: str) -> Verdict:
    text = f"{what}, and nothing is reached with network off"
    return Verdict(allowed=False, reason="network_off", message=text)


def _bypassed_proxy(what: str) -> Verdict:
    text = (
        f"{what} went past the proxy, which is the only way out: have the program "
        "connect by host name through the address in $HTTPS_PROXY, or use network open"
    )
    return Verdict(allowed=False, reason="past_proxy", message=text)


def _append(
    run_dir: RunDir, owner: str, what: tuple[str, str, str, int], verdict: Verdict, *, at: float
) -> None:
    """Append to an owner's log, up to its maximum size; a full disk is only logged.

    ``what``: the container's address, and the requested method, host and port; ``at``: when, in
    Unix seconds.
    """
    address, method, host, port = what
    entry = {
        "at": int(at * 1000) / 1000,
        "owner": owner,
        "address": address,
        "method": method,
        "host": host,
        "port": port,
        "verdict": "unreached" if verdict.allowed else "refused",
        "reason": verdict.reason,
        "message": verdict.message,
        "direct": True,
    }
    line = json.dumps(entry) + "\n"
    try:
        with (run_dir.direct / f"{owner}.ndjson").open("a") as log:
            if log.tell() < MAX_LOG_BYTES:
                log.write(line)
    except OSError as error:
        _log.warning("a direct request of %s could not be recorded: %s", owner, error)
