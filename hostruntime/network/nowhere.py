"""What a container with network `off` tries all the same: refused inside its own namespace, noted.

Such a namespace has no interface but its loopback, and this changes nothing about it.  Without a
route a connection fails before anything can see it (ip-route(8)), so there is one, to the loopback
itself.  A table in the namespace notes what takes it and refuses it at once (nft(8)).  Should the
table be gone, the kernel discards such packets where they come back in: they are for an address
that is not local, on a route that leads nowhere else.  No packet ever reaches the host's stack.

The container can change neither: the namespace belongs to the initial user namespace.  What was
noted waits there, so it is read only when somebody asks, and before the namespace is destroyed.
"""

from __future__ import annotations

from pathlib import Path

from hostruntime.host.run import run
from hostruntime.network import firewall
from hostruntime.network.firewall import PAST_PROXY, Attempt
from hostruntime.network.netns import run_ip, within

TABLE = "orkestr"
MOST = 256
"""How many attempts wait to be read, the first of them."""
_TIMEOUT = 20.0
# By reset, as where the network is restricted: an error by ICMP comes while connect(2) still holds
# the socket, and TCP then waits a second and tries again.  Filled again it keeps what it has noted.
_RULES = f"""\
table ip {TABLE} {{
  set {PAST_PROXY} {{ type ipv4_addr . inet_proto . ipv4_addr . inet_service; size {MOST}; \
flags dynamic; }}
  chain output {{ type filter hook output priority filter; policy accept; }}
}}
flush chain ip {TABLE} output
table ip {TABLE} {{
  chain output {{
    ip daddr 127.0.0.0/8 accept
    ip daddr 224.0.0.0/3 drop
    meta l4proto {{ tcp, udp }} ip saddr . meta l4proto . ip daddr . th dport != @{PAST_PROXY} \
limit rate {firewall.RATE} add @{PAST_PROXY} {{ ip saddr . meta l4proto . ip daddr . th dport }}
    meta l4proto tcp reject with tcp reset
    reject with icmp admin-prohibited
  }}
}}
"""
# What is for no one host has no way at all, as without this: nobody joins a group on the loopback.
_ROUTES = ["route replace unreachable 224.0.0.0/3", "route replace default dev lo src 127.0.0.1"]


def lead_nowhere(namespace: Path) -> None:
    """Refuse and note, from now on, what is tried in a namespace with nothing but a loopback.

    Idempotent.  Raises OSError or HostError; then there is no route, as without this.
    """

    def lead() -> None:
        run(["nft", "-f", "-"], input=_RULES.encode(), timeout=_TIMEOUT)
        run_ip(_ROUTES)

    within(namespace, lead)


def take_attempts(namespace: Path) -> list[Attempt]:
    """Return what was tried there since this was last called; raises OSError or HostError."""

    def take() -> list[Attempt]:
        # Most have never sent anything, and to look costs starting a program.
        return firewall.take_attempts(TABLE, family="ip") if _has_sent() else []

    return within(namespace, take)


def _has_sent() -> bool:
    """Whether any packet was sent in this thread's namespace: to refuse one sends another.

    /proc/net/snmp has a line of names, then one of numbers (proc_net(5)).
    """
    lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("Ip:"))
    return int(values[names.index("OutRequests")]) > 0
