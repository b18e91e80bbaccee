"""The nftables table of an instance (nft(8)): what slots may send, by the kind of their interface.

Interfaces are named by mode (`ork0-r5` restricted, `ork0-o5` open), so the whole table is
installed once, in one transaction, and no slot needs a rule of its own: an address is bound to
its interface by the host's route to it, which is what `fib saddr . iif` checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any

from hostruntime.host.run import run
from hostruntime.network.policy import Network
from hostruntime.network.squid_config import SOCKETS_PER_CONTAINER

# Not Squid's usual port, which a Squid of the operator's own may hold on every address.
PROXY_PORT = 13128
# The set of containers that have connections to the proxy, each with their number.
CLIENTS = "clients"
# What restricted containers tried past the proxy, and how much of its rate each has used.
PAST_PROXY, PACE = "attempts", "pace"
# More than there are slots: an address that found no room in it would not be counted.
_CLIENTS = 1024
# How many connections a slot with an open network has that are not over yet, and how fast it begins
# others: the host tracks all in one table (nf_conntrack_max), those that are over for up to two
# minutes more, and when that is full nobody gets another.
CONNECTIONS, BEGINNING = "connections", "beginning"
CONNECTIONS_PER_SLOT = 2048
BEGINNINGS = "256/second burst 4096 packets"
# What containers do changes these, and nobody else: not part of what the table must be.
CHANGING = (CLIENTS, PAST_PROXY, PACE, CONNECTIONS, BEGINNING)
_ATTEMPTS = 65536
RATE = "1/second burst 32 packets"
_TIMEOUT = 20.0
_MARK_BASE = 0x6F726B00


@dataclass(frozen=True)
class FirewallPlan:
    """The values an instance's table is made of."""

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
    beginnings: str = BEGINNINGS


def proxy_mark(instance_index: int) -> int:
    """Return the packet mark that tells an instance's proxy connections from all others."""
    return _MARK_BASE + instance_index


def install(plan: FirewallPlan) -> None:
    """Replace the instance's table in one transaction; raises CommandFailed."""
    head = f"table inet {plan.table}\ndelete table inet {plan.table}\n"
    run(["nft", "-f", "-"], input=(head + ruleset(plan)).encode(), timeout=_TIMEOUT)


def remove(table: str) -> None:
    """Delete the table if it is there; raises CommandFailed."""
    text = f"table inet {table}\ndelete table inet {table}\n"
    run(["nft", "-f", "-"], input=text.encode(), timeout=_TIMEOUT)


@dataclass(frozen=True)
class Attempt:
    """A connection, or a datagram, that a slot's address tried past the proxy."""

    source: str
    protocol: str
    address: str
    port: int


def take_attempts(table: str, family: str = "inet") -> list[Attempt]:
    """Return what was tried since this was last called; raises CommandFailed.

    Of the calling thread's network namespace.  Only what is returned is taken out of the set, so
    nothing is lost that comes meanwhile.
    """
    listing = run(["nft", "-j", "list", "set", family, table, PAST_PROXY], timeout=_TIMEOUT).stdout
    found = [_attempts_in(item["set"]) for item in json.loads(listing)["nftables"] if "set" in item]
    attempts = [one for each in found for one in each]
    if attempts:
        keys = ", ".join(
            f"{one.source} . {one.protocol} . {one.address} . {one.port}" for one in attempts
        )
        text = f"delete element {family} {table} {PAST_PROXY} {{ {keys} }}\n"
        # One may have timed out since, and then none is deleted: they are told twice.
        run(["nft", "-f", "-"], input=text.encode(), timeout=_TIMEOUT, check=False)
    return attempts


def _attempts_in(listed: Mapping[str, Any]) -> list[Attempt]:
    # One that does not time out is not wrapped (libnftables-json(5)).
    elements = [item.get("elem", {"val": item})["val"] for item in listed.get("elem", [])]
    return [
        Attempt(str(source), str(protocol), str(address), int(port))
        for source, protocol, address, port in (element["concat"] for element in elements)
    ]


def ruleset(plan: FirewallPlan) -> str:
    """Return the table as nft(8) reads it."""
    return f"""table inet {plan.table} {{
{_named_sets(plan)}
{_past_proxy(plan)}
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


def _past_proxy(plan: FirewallPlan) -> str:
    # Refused here and not further on, because an interface that forwards nothing (netns.py) lets
    # such packets vanish, and programs wait. By reset, since ICMP is sent to an address but once a
    # second (icmp_ratelimit, icmp(7)). Each container is noted at a rate of its own, so that none
    # fills the set with what it scans.
    return f"""  set {PACE} {{ type ipv4_addr; size {_CLIENTS}; flags dynamic,timeout; \
timeout 1m; }}
  set {PAST_PROXY} {{ type ipv4_addr . inet_proto . ipv4_addr . inet_service; \
size {_ATTEMPTS}; flags dynamic,timeout; timeout 5m; }}
  chain past_proxy {{
    ip daddr 224.0.0.0/3 drop
    meta l4proto {{ tcp, udp }} add @{PACE} {{ ip saddr limit rate {RATE} }} \
update @{PAST_PROXY} {{ ip saddr . meta l4proto . ip daddr . th dport }}
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}"""


def _input(plan: FirewallPlan) -> str:
    # The proxy's address is nobody's but the restricted slots': not the host's other users'
    # networks, which would otherwise find a forward proxy there.
    # A connection that says nothing costs the proxy a descriptor all the same, so they are counted
    # here, by address.
    return f"""  set {CLIENTS} {{ type ipv4_addr; size {_CLIENTS}; flags dynamic; }}
  chain input {{
    type filter hook input priority filter - 5; policy accept;
    iifname "{plan.prefix}r*" ip saddr {plan.restricted} ip daddr {plan.proxy} \
tcp dport {plan.proxy_port} jump to_proxy
    iifname "{plan.prefix}*" reject with icmpx admin-prohibited
    iifname != "lo" ip daddr {plan.proxy} drop
  }}
  chain to_proxy {{
    ct state new add @{CLIENTS} {{ ip saddr ct count over {plan.sockets} }} \
reject with tcp reset
    accept
  }}"""


def _forward(plan: FirewallPlan) -> str:
    return f"""  set {CONNECTIONS} {{ type ipv4_addr; size {_CLIENTS}; flags dynamic; }}
  set {BEGINNING} {{ type ipv4_addr; size {_CLIENTS}; flags dynamic,timeout; timeout 1m; }}
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
    add @{CONNECTIONS} {{ ip saddr ct count over {plan.connections} }} goto too_many
    add @{BEGINNING} {{ ip saddr limit rate over {plan.beginnings} }} goto too_many
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
    # The proxy refuses such addresses itself; this holds when a name changes between the check
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
