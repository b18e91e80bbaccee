"""The way out: forwarding, others' firewalls, the proxy, the registries, the console's port."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from hostruntime.egress import host_registries, proxy_obstacles
from hostruntime.errors import HostError
from hostruntime.foreign_firewalls import barriers
from hostruntime.paths import StatePaths
from orkestr_console.runner.doctor.finding import Finding, is_root, read_number, unseen
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import holder


def check_forwarding(_: Layout) -> Finding:
    """Sandboxes with an open network are routed; the agent turns forwarding on if it is off."""
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    if read_number(switch) == 1:
        return Finding("ip_forward", "ok", "on")
    if os.access(switch, os.W_OK):
        return Finding("ip_forward", "ok", "off; the agent turns it on")
    remedy = "sysctl -w net.ipv4.ip_forward=1"
    return Finding("ip_forward", "warn", "off, and may not be turned on", remedy)


def check_firewalls(_: Layout) -> Finding:
    """Docker, ufw and firewalld drop what they were not told of, whatever our rules accept."""
    if not is_root():
        return unseen("firewalls")
    try:
        found = barriers()
    except HostError as error:
        seen = f"cannot be seen: {' '.join(error.detail.split())}"
        return Finding("firewalls", "warn", seen, "apt-get install nftables (make run does it)")
    if not found:
        return Finding("firewalls", "ok", "no other rules are in the way of sandboxes")
    seen = "; ".join(barrier.seen for barrier in found)
    return Finding("firewalls", "warn", seen, "; ".join(barrier.remedy for barrier in found))


def check_proxy(_: Layout) -> Finding:
    """Squid, as the egress proxy needs it."""
    if not is_root():
        return unseen("egress proxy")
    obstacles = proxy_obstacles()
    if not obstacles:
        return Finding("egress proxy", "ok", "Squid can be run")
    remedy = "; ".join(obstacles[1:]) or "apt-get install squid-openssl (make run does it)"
    return Finding("egress proxy", "fail", obstacles[0], remedy)


def check_registries(layout: Layout) -> Finding:
    """What pip, npm and apt of this machine say is what sandboxes reach by default."""
    paths = StatePaths(layout.state_dir)
    notes = host_registries(paths).notes
    if not notes:
        return Finding("registries", "ok", "pip, npm and apt say where they fetch from")
    remedy = "sandboxes on network restricted do without what is named here"
    return Finding("registries", "warn", "; ".join(notes), remedy)


def check_port(layout: Layout) -> Finding:
    """The console's port; it is no fault if this very installation serves on it."""
    if holder(layout) is not None:
        return Finding("port", "ok", f"{layout.port}: this console serves on it")
    if port_is_free(layout.port):
        return Finding("port", "ok", f"{layout.port} is free")
    remedy = f"choose another: make run PORT={layout.port + 1}"
    return Finding("port", "fail", f"{layout.port} is in use by another program", remedy)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of every address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno not in {errno.EADDRINUSE, errno.EACCES}
    return True
