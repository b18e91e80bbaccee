"""Network settings of the operator, and the host's resolvers."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hostruntime.network.policy import Network, PolicyError, deny_list, parse_networks

_RESOLVER_FILES = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))


@dataclass(frozen=True)
class NetworkSettings:
    """The operator's network settings, read from the agent's environment.

    `ORKESTR_EGRESS_DENY` and `ORKESTR_EGRESS_PERMIT` are comma-separated networks added to, and
    cut out of, the deny list. `ORKESTR_DNS` names the resolvers (addresses, comma-separated)
    that containers with network open and the proxy use instead of the host's own.
    """

    denied: tuple[Network, ...]
    permitted: tuple[Network, ...]
    resolvers: tuple[str, ...]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> NetworkSettings:
        """Read the settings; raises PolicyError or ValueError for a malformed one."""
        permit = _split(environment, "ORKESTR_EGRESS_PERMIT")
        return cls(
            denied=deny_list(_split(environment, "ORKESTR_EGRESS_DENY"), permit),
            permitted=parse_networks(permit),
            resolvers=_addresses(_split(environment, "ORKESTR_DNS")) or host_resolvers(),
        )


def host_resolvers(files: Iterable[Path] = _RESOLVER_FILES) -> tuple[str, ...]:
    """Return the host's resolvers that are not on its loopback (resolv.conf(5)).

    With a local stub (systemd-resolved), these are the stub's upstream servers.
    """
    for path in files:
        text = path.read_text(errors="replace") if path.exists() else ""
        words = [line.split() for line in text.splitlines()]
        named = [word[1] for word in words if len(word) > 1 and word[0] == "nameserver"]
        if found := tuple(name for name in named if _reachable(name)):
            return found
    return ()


def _split(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in environment.get(name, "").split(",") if word.strip())


def _addresses(texts: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(str(ipaddress.ip_address(text)) for text in texts)
    except ValueError as error:
        raise PolicyError(f"ORKESTR_DNS takes addresses of resolvers: {error}") from error


def _reachable(text: str) -> bool:
    """Whether a resolver is reachable from outside the host's loopback and local link."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local)
