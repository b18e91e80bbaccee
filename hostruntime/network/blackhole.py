"""Reject and record the connection attempts of a container with network `off`, in its namespace.

Such a namespace has only a loopback interface, and still has after this. Without a route, a
connection fails before anything can record it (ip-route(8)), so there is one, to the loopback. A
table in the namespace records what uses that route and rejects it immediately (nft(8)). If the
table were missing, the kernel would discard such packets when they come back in: they are for a
non-local address, and the route leads nowhere else. No packet ever reaches the host's stack.

The container can change neither: the namespace belongs to the initial user namespace. Recorded
attempts stay there, and are read only on request and before the namespace is destroyed.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hostruntime.network import firewall, firewall_watch
from hostruntime.network.firewall import ATTEMPTS_SET, Attempt
from hostruntime.network.netns import run_in_namespace
from hostruntime.network.nft_process import NftProcess
from hostruntime.network.rtnetlink import RouteSocket

TABLE = "orkestr"
MAX_ATTEMPTS = 256
"""How many attempts are recorded until they are read."""
_NFPROTO_IPV4 = 2  # include/uapi/linux/netfilter.h
# By reset, as for restricted networks: an ICMP error would arrive while connect(2) still holds the
# socket, and TCP would then retry after a second. Reinstalling keeps what was recorded.
_RULES = f"""\
table ip {TABLE} {{
  set {ATTEMPTS_SET} {{ type ipv4_addr . inet_proto . ipv4_addr . inet_service; \
size {MAX_ATTEMPTS}; flags dynamic; }}
  chain output {{ type filter hook output priority filter; policy accept; }}
}}
flush chain ip {TABLE} output
table ip {TABLE} {{
  chain output {{
    ip daddr 127.0.0.0/8 accept
    ip daddr 224.0.0.0/3 drop
    meta l4proto {{ tcp, udp }} ip saddr . meta l4proto . ip daddr . th dport != @{ATTEMPTS_SET} \
limit rate {firewall.ATTEMPT_RATE} \
add @{ATTEMPTS_SET} {{ ip saddr . meta l4proto . ip daddr . th dport }}
    meta l4proto tcp reject with tcp reset
    reject with icmp admin-prohibited
  }}
}}
"""
_EVERYWHERE, _MULTICAST = IPv4Network("0.0.0.0/0"), IPv4Network("224.0.0.0/3")


def install_blackhole(nft: NftProcess) -> None:
    """Reject and record connection attempts in the calling thread's namespace, if that is missing.

    It must only have a loopback. Looking is cheap. Raises OSError or HostError; then the namespace
    has no route, as before: that is added after the table, which is complete as soon as it exists.
    """
    if firewall_watch.count_table_parts(TABLE, _NFPROTO_IPV4) is not None and _has_route():
        return
    nft.run(_RULES)
    with RouteSocket() as routes:
        # Multicast stays unreachable, so that nobody can join a group on the loopback.
        routes.replace_unreachable(_MULTICAST)
        routes.replace_route(_EVERYWHERE, "lo", source=IPv4Address("127.0.0.1"))


def _has_route() -> bool:
    """Whether this thread's namespace has a default route, which is 0.0.0.0 in route (proc(5))."""
    lines = Path("/proc/thread-self/net/route").read_text().splitlines()
    return any(line.split()[1] == "00000000" for line in lines[1:])


def drain_attempts(namespace: Path) -> list[Attempt]:
    """Return and remove the recorded attempts; raises OSError or HostError."""

    def drain() -> list[Attempt]:
        # Most have never sent anything.
        return firewall.drain_attempts(TABLE, family="ip") if _has_sent() else []

    return run_in_namespace(namespace, drain)


def _has_sent() -> bool:
    """Whether any packet was sent in this thread's namespace: each rejection sends one.

    /proc/net/snmp has a line of names, then one of numbers (proc_net(5)).
    """
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Ip:"))
    return int(values[names.index("OutRequests")]) > 0
