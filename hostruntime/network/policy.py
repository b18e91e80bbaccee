"""What a container may reach: pure decisions, without input or output.

There are three modes. `off` has loopback only. `restricted` may open TLS tunnels, through the
egress proxy, to the domains on its allowlist and their subdomains. `open` reaches the internet
through NAT. No mode reaches the addresses in the deny list.

This module is also shipped to the proxy's helper, which runs under any Python the `proxy` user can
execute, so at module level it imports only the standard library, and no sibling.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

Mode = Literal["off", "restricted", "open"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MODES: tuple[Mode, ...] = ("off", "restricted", "open")
MAX_DOMAINS = 200
MAX_HOST_LENGTH = 253  # RFC 1035, section 2.3.4, without the root label
TLS_PORT = 443
NO_POLICY = "no policy is known for this address"
# In an allowlist: includes the host's default list.
DEFAULT_LIST = "@default"

# RFC 952 does not allow underscores in host names, but bucket and tenant names in DNS have them.
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
# What inet_aton(3) parses as a number: a name whose last label is one is an address.
_NUMERIC_LABEL = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)", re.ASCII)

# Never reachable from a container, whatever its policy. Listed explicitly because Python's
# `is_global` also considers the documentation ranges private, where real mirrors exist.
_DENIED_V4 = (
    "0.0.0.0/8",  # "this host" (RFC 1122)
    "10.0.0.0/8",  # private (RFC 1918)
    "100.64.0.0/10",  # carrier-grade NAT (RFC 6598); some clouds put metadata here
    "127.0.0.0/8",  # loopback
    "169.254.0.0/16",  # link-local (RFC 3927), the usual metadata address
    "172.16.0.0/12",  # private (RFC 1918)
    "192.0.0.0/24",  # protocol assignments (RFC 6890); metadata on one cloud
    "192.168.0.0/16",  # private (RFC 1918)
    "168.63.129.16/32",  # platform endpoint of one cloud, outside every special range
    "198.18.0.0/15",  # benchmarking (RFC 2544)
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and the broadcast address
)
_DENIED_V6 = (
    "::/127",  # unspecified and loopback
    "64:ff9b:1::/48",  # local NAT64 (RFC 8215)
    "2001::/32",  # Teredo
    "2002::/16",  # 6to4
    "fc00::/7",  # unique local
    "fe80::/10",  # link-local
    "fec0::/10",  # site-local, deprecated
    "ff00::/8",  # multicast
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class PolicyError(ValueError):
    """An invalid policy; the message is one sentence for the person who sent it."""


@dataclass(frozen=True)
class Policy:
    """What a container may reach. `allow_domains` None means the host's default list."""

    mode: Mode
    allow_domains: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown mode, and an allowlist that no proxy would apply."""
        if self.mode not in MODES:
            raise PolicyError(f"network must be off, restricted or open, not {self.mode!r}")
        if self.allow_domains is not None and self.mode != "restricted":
            raise PolicyError("allow_domains applies to network restricted only")

    @classmethod
    def parse(cls, mode: str, allow_domains: Iterable[str] | None = None) -> Policy:
        """Return the policy of a request, with normalised domains; raises PolicyError."""
        if mode not in MODES:
            raise PolicyError(f"network must be off, restricted or open, not {mode!r}")
        domains = None if allow_domains is None else normalise_domains(allow_domains)
        return cls(mode=mode, allow_domains=domains)


@dataclass(frozen=True)
class Verdict:
    """A decision: `reason` is a code for machines, `message` a sentence for people."""

    allowed: bool
    reason: str
    message: str


# Host names and domains -------------------------------------------------------------------


def canonical_host(host: str) -> str | None:
    """Return a host name in lower-case ASCII without its final dot; None if it is not one.

    Address literals, in any notation inet_aton(3) reads, are not host names.
    """
    name = host.lower().removesuffix(".")
    if not name or not name.isascii() or len(name) > MAX_HOST_LENGTH:
        return None
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return None
    return None if _NUMERIC_LABEL.fullmatch(labels[-1]) else name


def is_address_literal(host: str) -> bool:
    """Whether a host is an IP address, bracketed or in one of inet_aton's notations."""
    bare = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return _NUMERIC_LABEL.fullmatch(bare.lower().rstrip(".").rpartition(".")[2]) is not None
    return True


def matches(host: str, domains: Iterable[str]) -> str | None:
    """Return the domain that matches a canonical host (itself or a parent), or None."""
    listed = frozenset(domains)
    name = host
    while name:
        if name in listed:
            return name
        name = name.partition(".")[2]
    return None


def normalise_domain(text: str) -> str:
    """Return one allowlist entry in its canonical form; raises PolicyError.

    Case is folded, a final dot and a leading `*.` (subdomains match anyway) are dropped, and an
    international name becomes its A-labels (IDNA 2008 with UTS 46 mapping, non-transitional).
    """
    shown = repr(text[:80])
    wanted = text.strip()
    name = _to_ascii(wanted.removeprefix("*."), shown)
    if "*" in name:
        raise PolicyError(f"{shown}: a wildcard may only lead, as in *.example.com")
    if "/" in name or ":" in name or "@" in name:
        raise PolicyError(f"{shown}: give the host name alone, without scheme, port or path")
    if is_address_literal(name):
        raise PolicyError(f"{shown}: is an address; the allowlist takes host names")
    host = canonical_host(name)
    if host is None:
        raise PolicyError(f"{shown}: is not a host name")
    if "." not in host:
        raise PolicyError(f"{shown}: needs at least two labels, as in example.com")
    return host


def normalise_domains(texts: Iterable[str]) -> tuple[str, ...]:
    """Return allowlist entries normalised, deduplicated and in order; raises PolicyError.

    :data:`DEFAULT_LIST` stays as it is.
    """
    found: dict[str, None] = {}
    for text in texts:
        if not isinstance(text, str):
            raise PolicyError("allow_domains must be a list of host names")
        found[text if text == DEFAULT_LIST else normalise_domain(text)] = None
        if len(found) > MAX_DOMAINS:
            raise PolicyError(f"allow_domains takes at most {MAX_DOMAINS} host names")
    return tuple(found)


def parse_domain_list(text: str) -> tuple[str, ...]:
    """Return the domains of a data file: one a line, `#` starts a comment; raises PolicyError."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    found: dict[str, None] = {}
    for line in lines:
        if line:
            found[normalise_domain(line)] = None
    return tuple(found)


def _to_ascii(name: str, shown: str) -> str:
    if name.isascii():
        return name.lower()
    # Imported here because the proxy's helper, which never sees a Unicode name, lacks it.
    import idna

    try:
        ascii_name = idna.encode(name, uts46=True, transitional=False).decode("ascii")
    except idna.IDNAError as error:
        raise PolicyError(f"{shown}: is not a valid international host name") from error
    return ascii_name.lower()


# Decisions --------------------------------------------------------------------------------


def decide(
    domains: Iterable[str] | None, method: str, host: str, port: int, *, shown: str | None = None
) -> Verdict:
    """Decide one request to the proxy; `domains` None means the container has no policy.

    The address behind the name is checked later, by Squid, which resolves it.
    """
    name = shown or host
    if domains is None:
        return Verdict(allowed=False, reason="no_policy", message=NO_POLICY)
    if method != "CONNECT":
        text = f"plain HTTP to {name} is refused: only HTTPS is allowed, use https://"
        return Verdict(allowed=False, reason="not_https", message=text)
    if is_address_literal(host):
        return Verdict(
            allowed=False,
            reason="address_literal",
            message=f"{name} is an address: connect by host name",
        )
    canonical = canonical_host(host)
    if canonical is None:
        return Verdict(allowed=False, reason="bad_host", message=f"{name} is not a host name")
    if port != TLS_PORT:
        return Verdict(
            allowed=False,
            reason="bad_port",
            message=f"port {port} of {name}: only port {TLS_PORT} is allowed",
        )
    if matches(canonical, domains) is None:
        text = f"{canonical} is not on its allowlist: add it to allow_domains, or use network open"
        return Verdict(allowed=False, reason="not_listed", message=text)
    return Verdict(allowed=True, reason="allowed", message=f"{canonical} is on the allowlist")


def check_hello(host: str, server_name: str) -> Verdict:
    """Check the server name in a tunnel's TLS ClientHello (RFC 6066, section 3) against ``host``.

    With another name, a shared front end would serve another host (domain fronting).
    """
    if not server_name or server_name == "-":
        text = f"the TLS connection to {host} names no server (SNI), so it cannot be checked"
        return Verdict(allowed=False, reason="no_server_name", message=text)
    if canonical_host(server_name) != canonical_host(host):
        text = f"the TLS connection asked for {host} but names {server_name[:80]!r} (SNI)"
        return Verdict(allowed=False, reason="server_name_differs", message=text)
    return Verdict(allowed=True, reason="allowed", message=f"{host} is named in the tunnel too")


# The reasons for which an open tunnel is closed.
CUT_REASONS = frozenset({"no_server_name", "server_name_differs", "not_tls"})


def not_tls_verdict(host: str) -> Verdict:
    """Refuse a tunnel to ``host`` without a TLS ClientHello: its destination cannot be checked."""
    text = f"the traffic to {host} is not TLS: only HTTPS is allowed"
    return Verdict(allowed=False, reason="not_tls", message=text)


# Addresses --------------------------------------------------------------------------------


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Parse CIDR blocks; raises PolicyError for an invalid one."""
    found: list[Network] = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text.strip()))
        except ValueError as error:
            raise PolicyError(f"{text!r} is not a network such as 10.0.0.0/8") from error
    return tuple(found)


def deny_list(extra: Iterable[str] = (), permit: Iterable[str] = ()) -> tuple[Network, ...]:
    """Return the networks no container may reach: the built-in ones and `extra`, minus `permit`.

    With `permit` an operator opens a package mirror inside a private range. NAT64 forms of the
    IPv4 networks are included. Raises PolicyError.
    """
    holes = parse_networks(permit)
    denied = [
        rest
        for net in parse_networks((*_DENIED_V4, *_DENIED_V6, *extra))
        for rest in _subtract(net, holes)
    ]
    v4 = [net for net in denied if isinstance(net, ipaddress.IPv4Network)]
    v6 = [net for net in denied if isinstance(net, ipaddress.IPv6Network)]
    v6 += [_behind_nat64(net) for net in v4]
    return (*ipaddress.collapse_addresses(v4), *ipaddress.collapse_addresses(v6))


def is_denied(address: Address, denied: Iterable[Network]) -> bool:
    """Whether an address, or the IPv4 address mapped into it, is in the deny list."""
    mapped = getattr(address, "ipv4_mapped", None)
    plain: Address = address if mapped is None else mapped
    return any(plain.version == net.version and plain in net for net in denied)


def _behind_nat64(net: ipaddress.IPv4Network) -> ipaddress.IPv6Network:
    base = int(_NAT64.network_address) + int(net.network_address)
    return ipaddress.IPv6Network((base, 96 + net.prefixlen))


def _subtract(net: Network, holes: Iterable[Network]) -> list[Network]:
    """Return what remains of a network without the holes."""
    remaining = [net]
    for hole in holes:
        remaining = [rest for part in remaining for rest in _subtract_one(part, hole)]
    return remaining


def _subtract_one(net: Network, hole: Network) -> list[Network]:
    if isinstance(net, ipaddress.IPv4Network) and isinstance(hole, ipaddress.IPv4Network):
        if not net.overlaps(hole):
            return [net]
        return list(net.address_exclude(hole)) if hole.subnet_of(net) else []
    if isinstance(net, ipaddress.IPv6Network) and isinstance(hole, ipaddress.IPv6Network):
        if not net.overlaps(hole):
            return [net]
        return list(net.address_exclude(hole)) if hole.subnet_of(net) else []
    return [net]
