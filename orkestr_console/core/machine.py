"""Facts about this machine for the settings: its secrets, names, addresses, size."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # netdevice(7)
# A build waits for the network and the disk half of the time, and few use the 4 GiB they may.
BUILDS_PER_CPU = 4
BUILD_BYTES = 2 * 1024**3
MIN_BUILDS = 2
# A web process takes 110 MB, a third of which it shares with the others.
WEB_PROCESS_BYTES = 1024**3
MAX_WEB_PROCESSES = 8


def secret(variable: str, path: Path) -> str:
    """The secret in environment variable ``variable``, else in ``path``, created if missing.

    Several processes may start concurrently: the first to link its file wins, and all read that.
    Raises ``OSError`` if the file can be neither read nor created.
    """
    if value := os.environ.get(variable):
        return value
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(48))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text().strip()


def allowed_hosts(public: str | None, configured: str) -> list[str]:
    """The host names requests may be addressed to.

    ``public`` is the host of the public URL, ``configured`` the operator's comma-separated
    additions. The machine's own names and addresses are always included, and foreign names never
    are, which prevents DNS rebinding.
    """
    name = socket.gethostname()
    own = ["localhost", ".localhost", "127.0.0.1", "[::1]", name, f"{name}.local"]
    extra = [host.strip() for host in configured.split(",") if host.strip()]
    return list(dict.fromkeys([*filter(None, [public]), *own, *own_addresses(), *extra]))


def own_addresses() -> list[str]:
    """The IP addresses of this machine's interfaces; IPv6 ones in brackets, as in URLs."""
    return [*_ipv4_addresses(), *_ipv6_addresses()]


def _ipv4_addresses() -> list[str]:
    addresses = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:
                # An interface without an IPv4 address.
                continue
            addresses.append(socket.inet_ntoa(answer[20:24]))
    return addresses


def _ipv6_addresses() -> list[str]:
    table = Path("/proc/net/if_inet6")
    if not table.exists():
        return []
    packed = [bytes.fromhex(line.split()[0]) for line in table.read_text().splitlines()]
    return [f"[{socket.inet_ntop(socket.AF_INET6, address)}]" for address in packed]


def max_concurrent_builds() -> int:
    """How many concurrent builds this machine has the CPUs and the memory for (sysconf(3))."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    by_cpus = BUILDS_PER_CPU * (os.cpu_count() or 1)
    return max(MIN_BUILDS, min(by_cpus, memory // BUILD_BYTES))


def web_processes(configured: str) -> int:
    """How many web processes serve: ``configured``, else as many as CPUs and memory allow.

    Raises ``ValueError`` with the fix.
    """
    if configured:
        if not configured.isdecimal() or not 0 < int(configured) <= MAX_WEB_PROCESSES:
            raise ValueError(
                f"ORKESTR_WEB_PROCESSES is {configured!r}: give a number from 1 to "
                f"{MAX_WEB_PROCESSES}, or leave it unset for one per CPU"
            )
        return int(configured)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpus = len(os.sched_getaffinity(0))
    return max(1, min(cpus, MAX_WEB_PROCESSES, memory // WEB_PROCESS_BYTES))
