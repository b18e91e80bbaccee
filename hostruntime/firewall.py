"""The nftables table of an instance (nft(8)): what slots may send, by the kind of their interface.

Interfaces are named by mode (`ork0-r5` restricted, `ork0-o5` open), so the whole table is
installed once, in one transaction, and no slot needs a rule of its own: an address is bound to
its interface by the host's route to it, which is what `fib saddr . iif` checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Network

from hostruntime.policy import Network
from hostruntime.run import run
from hostruntime.squid_config import SOCKETS_PER_CONTAINER

# Not Squid's usual port, which a Squid of the operator's own may hold on every address.
PROXY_PORT = 13128
# The set of containers that have connections to the proxy, each with their number.
CLIENTS = "clients"
# More than there are slots: an address that found no room in it would not be counted.
_CLIENTS = 1024
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


def ruleset(plan: FirewallPlan) -> str:
    """Return the table as nft(8) reads it."""
    return f"""table inet {plan.table} {{
{_named_sets(plan)}
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
    return f"""  chain forward {{
    type filter hook forward priority filter - 5; policy accept;
    iifname "{plan.prefix}*" jump from_slot
    oifname "{plan.prefix}*" jump to_slot
  }}
  chain from_slot {{
    iifname != "{plan.prefix}o*" reject with icmpx admin-prohibited
    ip saddr != {plan.open} drop
    oifname "{plan.prefix}*" reject with icmpx admin-prohibited
    tcp flags syn tcp option maxseg size set rt mtu
    ip daddr @resolvers meta l4proto {{ tcp, udp }} th dport 53 accept
    meta l4proto {{ tcp, udp }} th dport {{ 53, 853 }} reject with icmpx admin-prohibited
    ip daddr @denied4 reject with icmpx admin-prohibited
    accept
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
