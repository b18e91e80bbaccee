"""Ensures that an instance's nftables table is complete whenever a container starts.

Other programs manage rules on the host, too: their reloads often begin with `nft flush ruleset`.
Checking that the table exists takes one netlink message (linux/netfilter/nf_tables.h), at every
start; checking each rule takes a listing, every few seconds.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import struct
import threading

from hostruntime.errors import HostError, HostUnavailable
from hostruntime.host.patience import scaled
from hostruntime.host.run import run
from hostruntime.network import firewall

_NETLINK_NETFILTER = 12
_NFT_MSG_GETTABLE = (10 << 8) | 1  # NFNL_SUBSYS_NFTABLES
_NFPROTO_INET = 1
_NFTA_TABLE_NAME, _NFTA_TABLE_USE = 1, 3
_NLM_F_REQUEST = 0x1
_NLMSG_ERROR = 2
_TIMEOUT = 20.0
_RESPONSE_SECONDS = 5.0
_log = logging.getLogger(__name__)


class FirewallWatch:
    """One instance's table. Thread-safe; raises HostUnavailable if it cannot be installed."""

    def __init__(self, plan: firewall.FirewallPlan) -> None:
        self.plan = plan
        self._lock = threading.Lock()
        self._parts: int | None = None
        self._listing: str | None = None

    def install(self) -> None:
        """Replace the table."""
        with self._lock:
            self._install()

    def ensure_present(self) -> None:
        """Reinstall the table if it, or a chain or set of it, is missing; otherwise cheap."""
        if self._parts is not None and self._parts == count_table_parts(self.plan.table):
            return
        with self._lock:
            if self._parts is None or self._parts != count_table_parts(self.plan.table):
                _log.error("the firewall table %s was missing", self.plan.table)
                self._install()

    def ensure_intact(self) -> None:
        """Reinstall the table if any rule or address of it was added or removed."""
        with self._lock:
            if self._listing is None or self._listing != self._list_table():
                _log.error("the firewall table %s was missing or changed", self.plan.table)
                self._install()

    def _install(self) -> None:
        # Assume it is missing until it has been listed.
        self._parts = self._listing = None
        try:
            firewall.install(self.plan)
            self._listing = self._list_table()
            self._parts = count_table_parts(self.plan.table)
        except (HostError, OSError) as error:
            detail = f"The firewall cannot be installed, so nothing may use the network: {error}"
            raise HostUnavailable(detail) from error

    def _list_table(self) -> str | None:
        argv = ["nft", "--stateless", "list", "table", "inet", self.plan.table]
        listed = run(argv, timeout=_TIMEOUT, check=False)
        # Ignore sets whose elements are the containers' current connections and attempts.
        names = "|".join(firewall.DYNAMIC_SETS)
        own = re.compile(rf"\n\tset (?:{names}) \{{.*?\n\t\}}", re.DOTALL)
        return own.sub("", listed.text) if listed.returncode == 0 else None


def count_table_parts(table: str, family: int = _NFPROTO_INET) -> int | None:
    """Count the chains and sets of a table; None if there is no such table.

    Uses the calling thread's network namespace. Raises OSError.
    """
    name = table.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(name), _NFTA_TABLE_NAME) + name + bytes(-len(name) % 4)
    body = struct.pack("=BBH", family, 0, 0) + attribute
    head = struct.pack("=IHHII", 16 + len(body), _NFT_MSG_GETTABLE, _NLM_F_REQUEST, 1, 0)
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as handle:
        handle.settimeout(scaled(_RESPONSE_SECONDS))
        handle.bind((0, 0))
        handle.send(head + body)
        return _parse_use_count(handle.recv(4096))


def _parse_use_count(answer: bytes) -> int | None:
    if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR:
        code = -struct.unpack_from("=i", answer, 16)[0]
        if code == errno.ENOENT:
            return None
        raise OSError(code, f"nftables: {os.strerror(code)}")
    at, end = 20, struct.unpack_from("=I", answer)[0]
    while at + 4 <= end:
        length, kind = struct.unpack_from("=HH", answer, at)
        if kind == _NFTA_TABLE_USE:
            return int(struct.unpack_from("!I", answer, at + 4)[0])
        at += max(4, length + -length % 4)
    raise OSError(errno.EPROTO, "nftables: a table without a count")
