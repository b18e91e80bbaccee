"""The nftables table of an instance (nft(8)): what slots may send, by interface name.

Interfaces are named by mode (`ork0-r5` restricted, `ork0-o5` open), so the complete table is
installed once, in one transaction, and slots need no rules of their own: an address is bound to
its interface by the host's route to it, which `fib saddr . iif` checks.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from socket import IPPROTO_TCP

from hostruntime.host.ids import MAX_SLOTS
from hostruntime.host.run import run
from hostruntime.network.policy import Network
from hostruntime.network.set_elements import Element, delete_elements, list_elements
from hostruntime.network.squid_config import SOCKETS_PER_CONTAINER

# Not Squid's usual port, which the operator's own Squid may use on every address.
PROXY_PORT = 13128
# The set of containers with connections to the proxy, and their number.
PROXY_CLIENTS_SET = "clients"
# Attempts of restricted containers to bypass the proxy, and the limiter for recording them.
ATTEMPTS_SET, ATTEMPT_RATES_SET = "attempts", "pace"
# More than there are slots: an address that does not fit would not be counted.  Twice as many, as
# one that is released stays for up to a minute.
_MAX_ADDRESSES = 2 * MAX_SLOTS
# The number of open connections of each slot with an open network, and the rate of new ones. The
# host tracks all in one table (nf_conntrack_max), closed ones for up to two more minutes, and when
# that is full nobody can open another.
CONNECTIONS_SET, NEW_CONNECTIONS_SET = "connections", "beginning"
CONNECTIONS_PER_SLOT = 2048
NEW_CONNECTION_RATE = "256/second burst 4096 packets"
# Only containers' activity changes these, so they are ignored when checking the table.
DYNAMIC_SETS = (
    PROXY_CLIENTS_SET,
    ATTEMPTS_SET,
    ATTEMPT_RATES_SET,
    CONNECTIONS_SET,
    NEW_CONNECTIONS_SET,
)
_MAX_ATTEMPTS = 65536
# Each attempt starts it anew, so what is left of it tells when the last one was.
_ATTEMPT_SECONDS = 300
# The kernel counts it in ticks (CONFIG_HZ): an attempt must not seem older than it is.
_CLOCK_TICK_SECONDS = 0.01
# Source, protocol, destination and port, each padded to four bytes.
_ATTEMPT_KEY = struct.Struct("!4sB3x4sH2x")
ATTEMPT_RATE = "1/second burst 32 packets"
_TIMEOUT = 20.0
_MARK_BASE = 0x6F726B00


@dataclass(frozen=True)
class FirewallPlan:
    """The parameters of an instance's table."""

    table: str
    prefix: str
    proxy: IPv4Address
    proxy_port: int
    restricted: IPv4Network
    open: IPv4Network
    resolvers: tuple[str, ...]
    denied: tuple[Network, ...]
    permitted: tuple[Network, ...]
    mark: int
    sockets: int = SOCKETS_PER_CONTAINER
    connections: int = CONNECTIONS_PER_SLOT
    new_connection_rate: str = NEW_CONNECTION_RATE


def proxy_mark(instance_index: int) -> int:
    """Return the packet mark that identifies an instance's proxy connections."""
    return _MARK_BASE + instance_index


def install(plan: FirewallPlan) -> None:
    """Replace the instance's table in one transaction; raises CommandFailed."""
    head = f"table inet {plan.table}\ndelete table inet {plan.table}\n"
    run(["nft", "-f", "-"], input=(head + ruleset(plan)).encode(), timeout=_TIMEOUT)


def remove(table: str) -> None:
    """Delete the table if it exists; raises CommandFailed."""
    text = f"table inet {table}\ndelete table inet {table}\n"
    run(["nft", "-f", "-"], input=text.encode(), timeout=_TIMEOUT)


@dataclass(frozen=True)
class Attempt:
    """A connection or datagram with which a slot's address tried to bypass the proxy.

    ``age_seconds`` is how long ago that was, the latest time of several; 0 if it isn't known.
    """

    source: str
    protocol: str
    address: str
    port: int
    age_seconds: float = 0.0


def drain_attempts(table: str, family: str = "inet") -> list[Attempt]:
    """Return and remove the attempts recorded since the last call; raises OSError.

    Looking takes one message to the kernel, and there is mostly nothing to remove. Uses the
    calling thread's network namespace. Only what is returned is removed from the set, so
    concurrent attempts are not lost.
    """
    found = list_elements(family, table, ATTEMPTS_SET)
    # Those that time out just now are reported twice, as are those that were to go with them.
    with contextlib.suppress(FileNotFoundError):
        delete_elements(family, table, ATTEMPTS_SET, [element.key for element in found])
    return [_attempt(element) for element in found]


def _attempt(element: Element) -> Attempt:
    source, protocol, address, port = _ATTEMPT_KEY.unpack(element.key)
    left_ms = element.expires_ms
    age = 0.0 if left_ms is None else _ATTEMPT_SECONDS - left_ms / 1000 - _CLOCK_TICK_SECONDS
    # Only these two are recorded.
    name = "tcp" if protocol == IPPROTO_TCP else "udp"
    where = str(IPv4Address(address)), port
    return Attempt(str(IPv4Address(source)), name, *where, age_seconds=max(age, 0.0))


def ruleset(plan: FirewallPlan) -> str:
    """Return the table in nft(8) syntax."""
    return f"""table inet {plan.table} {{
{_named_sets(plan)}
{_attempts_chain(plan)}
{_antispoof(plan)}
{_input(plan)}
{_forward(plan)}
{_proxy_output(plan)}
{_masquerade(plan)}
}}
"""


def _named_sets(plan: FirewallPlan) -> str:
    v4, v6 = _by_family(plan.denied)
    permit_v4, permit_v6 = _by_family(plan.permitted)
    resolvers = [address for address in plan.resolvers if ":" not in address]
    return "\n".join(
        (
            _set("denied4", "ipv4_addr", v4),
            _set("denied6", "ipv6_addr", v6),
            _set("permitted4", "ipv4_addr", permit_v4),
            _set("permitted6", "ipv6_addr", permit_v6),
            _set("resolvers", "ipv4_addr", resolvers),
        )
    )


def _set(name: str, kind: str, elements: Iterable[str]) -> str:
    listed = ", ".join(elements)
    filled = f" elements = {{ {listed} }};" if listed else ""
    return f"  set {name} {{ type {kind}; flags interval; auto-merge;{filled} }}"


def _by_family(networks: Iterable[Network]) -> tuple[list[str], list[str]]:
    listed = list(networks)
    v4 = [str(net) for net in listed if isinstance(net, IPv4Network)]
    v6 = [str(net) for net in listed if isinstance(net, IPv6Network)]
    return v4, v6


def _antispoof(plan: FirewallPlan) -> str:
    return f"""  chain antispoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname "{plan.prefix}*" meta nfproto ipv6 drop
    iifname "{plan.prefix}*" fib saddr . iif oif missing drop
    iifname "{plan.prefix}r*" ip daddr != {plan.proxy} jump past_proxy
  }}"""


def _attempts_chain(plan: FirewallPlan) -> str:
    # Rejected here and not later, because an interface that does not forward (netns.py) drops such
    # packets silently, and programs would wait. By reset, as ICMP is limited to one per second for
    # each address (icmp_ratelimit, icmp(7)). Recording is rate-limited for each container, so that
    # none can fill the set by scanning.
    return f"""  set {ATTEMPT_RATES_SET} {{ type ipv4_addr; size {_MAX_ADDRESSES}; \
flags dynamic,timeout; timeout 1m; }}
  set {ATTEMPTS_SET} {{ type ipv4_addr . inet_proto . ipv4_addr . inet_service; \
size {_MAX_ATTEMPTS}; flags dynamic,timeout; timeout {_ATTEMPT_SECONDS}s; }}
  chain past_proxy {{
    ip daddr 224.0.0.0/3 drop
    meta l4proto {{ tcp, udp }} add @{ATTEMPT_RATES_SET} {{ ip saddr limit rate {ATTEMPT_RATE} }} \
update @{ATTEMPTS_SET} {{ ip saddr . meta l4proto . ip daddr . th dport }}
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}"""


def _input(plan: FirewallPlan) -> str:
    # Only restricted slots may reach the proxy's address: to the host's other networks, it would
    # be an open forward proxy.
    # Even an idle connection costs the proxy a descriptor, so connections are counted here, by
    # address.
    return f"""  set {PROXY_CLIENTS_SET} {{ type ipv4_addr; size {_MAX_ADDRESSES}; flags dynamic; }}
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname "{plan.prefix}r*" ip saddr {plan.restricted} ip daddr {plan.proxy} \
tcp dport {plan.proxy_port} jump to_proxy
    iifname "{plan.prefix}*" reject with icmpx admin-prohibited
    iifname != "lo" ip daddr {plan.proxy} drop
  }}
  chain to_proxy {{
    ct state new add @{PROXY_CLIENTS_SET} {{ ip saddr ct count over {plan.sockets} }} \
reject with tcp reset
    accept
  }}"""


def _forward(plan: FirewallPlan) -> str:
    return f"""  set {CONNECTIONS_SET} {{ type ipv4_addr; size {_MAX_ADDRESSES}; flags dynamic; }}
  set {NEW_CONNECTIONS_SET} {{ type ipv4_addr; size {_MAX_ADDRESSES}; \
flags dynamic,timeout; timeout 1m; }}
  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname "{plan.prefix}*" jump from_slot
    oifname "{plan.prefix}*" jump to_slot
  }}
  chain from_slot {{
    iifname != "{plan.prefix}o*" reject with icmpx admin-prohibited
    ip saddr != {plan.open} drop
    oifname "{plan.prefix}*" reject with icmpx admin-prohibited
    tcp flags syn tcp option maxseg size set rt mtu
    ct status & confirmed == 0 jump begins
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} reject with icmpx admin-prohibited
    ip daddr @denied4 reject with icmpx admin-prohibited
    accept
  }}
  chain begins {{
    add @{CONNECTIONS_SET} {{ ip saddr ct count over {plan.connections} }} goto too_many
    add @{NEW_CONNECTIONS_SET} {{ ip saddr limit rate over {plan.new_connection_rate} }} \
goto too_many
  }}
  chain too_many {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain to_slot {{
    oifname "{plan.prefix}o*" ct direction reply ct state {{ established, related }} accept
    drop
  }}"""


def _proxy_output(plan: FirewallPlan) -> str:
    # The proxy refuses such addresses itself; this covers a name that changes between the check
    # and the connection.
    return f"""  chain output {{
    type filter hook output priority filter; policy accept;
    meta mark {plan.mark:#x} jump from_proxy
  }}
  chain from_proxy {{
    ip daddr @permitted4 accept
    ip6 daddr @permitted6 accept
    ip daddr @denied4 reject with icmpx admin-prohibited
    ip6 daddr @denied6 reject with icmpx admin-prohibited
    fib daddr type local reject with icmpx admin-prohibited
  }}"""


def _masquerade(plan: FirewallPlan) -> str:
    return f"""  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {plan.open} oifname != "{plan.prefix}*" masquerade
  }}"""
