"""What a container asked for past the proxy, as its owner's record of the network has it.

Names that its resolver was asked for (:mod:`hostruntime.network.stub_resolver`).  Asking is a
refusal where the policy would not have let the host through, and where it would, a mistake of the
program's, which should have asked the proxy.  And addresses that it tried by itself, as the
firewall saw them, or with network `off` its own namespace (:mod:`hostruntime.network.nowhere`).
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
# How a program gets to the proxy, whichever it is.
ADVICE = (
    "its program asked DNS for it, past the proxy: give the program the address in $HTTPS_PROXY, "
    "in its environment or as a proxy setting of its own"
)
# What service a record is about, in front of the host (RFC 2782): _hkps._tcp.keys.example.
_SERVICE = re.compile(r"^(?:_[^.]+\.)+")
# Names of no host elsewhere (RFC 6761, RFC 6762), and addresses' names.
_LOCAL = frozenset({"arpa", "local", "localhost"})
_POLICY_SECONDS = 5.0
_log = logging.getLogger(__name__)


@dataclass
class Listener:
    """Records the names that one slot's container asks for; for one thread.

    ``owner`` says who has the slot now, if anybody.
    """

    run_dir: RunDir
    mode: Mode
    address: str | None
    owner: Callable[[], str | None]
    _domains: frozenset[str] = field(default_factory=frozenset)
    _read_at: float = float("-inf")

    def hear(self, name: str) -> None:
        """Record a question unless it is for no host of the outside."""
        host = asked_host(name)
        owner = self.owner()
        if host is None or owner is None:
            return
        verdict = judge(self.mode, self._listed(), host)
        # A question names no port.
        _append(self.run_dir, owner, (self.address or "", "DNS", host, 0), verdict)

    def _listed(self) -> frozenset[str]:
        now = time.monotonic()
        if self.address is not None and now - self._read_at > _POLICY_SECONDS:
            entry = read_entry(self.run_dir.egress, self.address)
            self._domains, self._read_at = entry.domains or frozenset(), now
        return self._domains


def asked_host(name: str) -> str | None:
    """The host that a name asked of DNS is about, canonical; None if it is none elsewhere."""
    host = canonical_host(_SERVICE.sub("", name))
    if host is None or "." not in host or host.rpartition(".")[2] in _LOCAL:
        return None
    return host


def judge(mode: Mode, domains: frozenset[str], host: str) -> Verdict:
    """What there is to say of a host that was asked for by DNS."""
    if mode == "off":
        return _off(f"{host} was asked for")
    if matches(host, domains) is None:
        text = (
            f"{host} is not on its allowlist, and {ADVICE}, and add the host to allow_domains; "
            "or use network open"
        )
        return Verdict(allowed=False, reason="not_listed", message=text)
    text = f"{host} is allowed, but through the proxy alone, and {ADVICE}"
    return Verdict(allowed=True, reason="past_proxy", message=text)


def record_attempt(run_dir: RunDir, owner: str, mode: Mode, attempt: Attempt) -> None:
    """Record that an owner's container tried an address by itself."""
    kind, where = attempt.protocol.upper(), f"{attempt.address}:{attempt.port}"
    if mode == "off":
        source, verdict = "", _off(f"{kind} to {where} was tried")
    else:
        source, verdict = attempt.source, _past_proxy(f"{kind} to {where}")
    _append(run_dir, owner, (source, kind, attempt.address, attempt.port), verdict)


def _off(what: str) -> Verdict:
    text = f"{what}, and nothing is reached with network off"
    return Verdict(allowed=False, reason="network_off", message=text)


def _past_proxy(what: str) -> Verdict:
    text = (
        f"{what} went past the proxy, which is the only way out: have the program "
        "connect by host name through the address in $HTTPS_PROXY, or use network open"
    )
    return Verdict(allowed=False, reason="past_proxy", message=text)


def _append(run_dir: RunDir, owner: str, what: tuple[str, str, str, int], verdict: Verdict) -> None:
    """Add to an owner's record, up to a size; a full disk is nobody's failure.

    ``what``: the container's address, and the method, host and port that it asked for.
    """
    address, method, host, port = what
    entry = {
        "at": int(time.time() * 1000) / 1000,
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
        _log.warning("what %s asked for past the proxy could not be recorded: %s", owner, error)
