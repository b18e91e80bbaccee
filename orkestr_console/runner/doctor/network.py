"""Network checks: forwarding, other firewalls, the proxy, registries, the console's port."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from hostruntime.errors import HostError
from hostruntime.host.paths import StatePaths
from hostruntime.network.egress import host_registries, proxy_problems
from hostruntime.network.foreign_firewalls import find_barriers
from orkestr_console.core.preview_base import LOCAL
from orkestr_console.runner.doctor.finding import Finding, is_root, needs_root, read_number
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import lock_holder


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
    """Docker, ufw and firewalld drop unknown traffic, whatever our rules accept."""
    if not is_root():
        return needs_root("firewalls")
    try:
        found = find_barriers()
    except HostError as error:
        seen = f"cannot be seen: {' '.join(error.detail.split())}"
        return Finding("firewalls", "warn", seen, "apt-get install nftables (make run does it)")
    if not found:
        return Finding("firewalls", "ok", "no other rules are in the way of sandboxes")
    seen = "; ".join(barrier.problem for barrier in found)
    return Finding("firewalls", "warn", seen, "; ".join(barrier.remedy for barrier in found))


def check_proxy(_: Layout) -> Finding:
    """Squid, as the egress proxy needs it."""
    if not is_root():
        return needs_root("egress proxy")
    obstacles = proxy_problems()
    if not obstacles:
        return Finding("egress proxy", "ok", "Squid can be run")
    remedy = "; ".join(obstacles[1:]) or "apt-get install squid-openssl (make run does it)"
    return Finding("egress proxy", "fail", obstacles[0], remedy)


def check_registries(layout: Layout) -> Finding:
    """This machine's pip, npm and apt configuration is what sandboxes reach by default."""
    paths = StatePaths(layout.state_dir)
    notes = host_registries(paths).notes
    if not notes:
        return Finding("registries", "ok", "pip, npm and apt say where they fetch from")
    remedy = "sandboxes on network restricted do without what is named here"
    return Finding("registries", "warn", "; ".join(notes), remedy)


def check_port(layout: Layout) -> Finding:
    """The console's port, which this installation itself may be serving on."""
    if lock_holder(layout) is not None:
        return Finding("port", "ok", f"{layout.port}: this console serves on it")
    if (problem := listen_problem(layout.port, layout.listen)) is None:
        return Finding("port", "ok", f"{layout.port} is free")
    return Finding("port", "fail", *problem)


def check_previews(layout: Layout) -> Finding:
    """The previews' port, and a domain that keeps their pages away from the console's."""
    base, port = layout.preview_base, layout.preview_port
    if base is None or port is None:
        return Finding("previews", "ok", "off: ORKESTR_PREVIEW_PORT says so")
    if lock_holder(layout) is None and (problem := listen_problem(port, layout.listen)):
        return Finding("previews", "fail", problem[0], "set ORKESTR_PREVIEW_PORT to another port")
    console = urlsplit(layout.url).hostname or ""
    seen = f"{port}, as {base.scheme}://<port>-<sandbox>.{base.authority}"
    if base.is_local:
        if console in {LOCAL, "127.0.0.1", "::1"}:
            return Finding("previews", "ok", seen)
        seen += ", which browsers on other machines can't reach"
        return Finding("previews", "warn", seen, "set ORKESTR_PREVIEW_BASE to a wildcard domain")
    if base.name.split(".")[-2:] == console.split(".")[-2:]:
        seen += f", on the console's own domain: a page there can set cookies for {console}"
        return Finding("previews", "warn", seen, "use a domain of its own for previews")
    if not base.is_secure:
        seen += ", without TLS: browsers don't say which page sent a request, so a page of another "
        seen += "sandbox can use a visitor's cookie"
        return Finding("previews", "warn", seen, "put TLS in front of it (README, Previews)")
    return Finding("previews", "ok", seen)


def listen_problem(port: int, addresses: Iterable[str]) -> tuple[str, str] | None:
    """Why a server cannot listen on ``port`` of these addresses, and what to do; None if it can."""
    for address in addresses:
        error = _bind_error(address, port)
        if error == errno.EADDRNOTAVAIL:
            return f"{address} is no address of this machine", "put right ORKESTR_LISTEN"
        if error == errno.EACCES:
            return f"{port} may not be listened on", f"choose another: make run PORT={port + 8000}"
        if error:
            seen = f"{port} is in use by another program"
            return seen, f"choose another: make run PORT={port + 1}"
    return None


def _bind_error(address: str, port: int) -> int:
    """The error number of bind(2); 0 for success."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno or errno.EIO
    return 0
