"""Create, enter and destroy a slot's network namespace.

The namespace belongs to the initial user namespace, so a container that joins it has no
CAP_NET_ADMIN or CAP_NET_RAW over it: its root cannot change an address, add a route or send raw
packets. It is held open by a bind mount (namespaces(7)), so it outlives the agent.

A networked namespace has one interface, `eth0`, whose other end is on the host and is routed
point-to-point: there is no bridge, so no neighbour is visible.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from hostruntime.errors import HostError
from hostruntime.host import kernel
from hostruntime.host.patience import scaled
from hostruntime.host.run import run
from hostruntime.host.rundir import RunDir
from hostruntime.network.rtnetlink import RouteSocket

_log = logging.getLogger(__name__)
_TIMEOUT = 20.0
_SIOCSIFFLAGS = 0x8914  # netdevice(7)
_IFF_UP_RUNNING = 0x1 | 0x40
# How long the number of leftover interfaces may stay the same until they are deleted one by one.
_VANISH_SECONDS = 5.0
_VANISH_POLL_SECONDS = 0.02
_SYSFS_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC

# Allow ports below 1024 and ping for everyone: container root lacks the capabilities over the
# namespace that would otherwise be required (ip(7), icmp(7)).
_SYSCTLS_INSIDE = {
    "net/ipv4/ip_unprivileged_port_start": "0",
    "net/ipv4/ping_group_range": "0 2147483647",
    "net/ipv6/conf/default/disable_ipv6": "1",
}


@dataclass(frozen=True)
class Link:
    """A networked namespace's interface: its host end, its address and its gateway.

    Everything is sent to `gateway`. Unless `forwarded`, the host does not forward packets for
    other destinations: the kernel drops them on arrival, whatever the firewall says.
    """

    host_end: str
    address: IPv4Address
    gateway: IPv4Address
    forwarded: bool


def create_namespace(
    run_dir: RunDir, name: str, link: Link | None, inside: Callable[[], None]
) -> None:
    """Create a namespace, its sysfs and its link; cleans up on failure.

    `inside` is called in it before it has the link. Raises OSError and whatever `inside` does.
    """
    destroy_namespace(run_dir, name, link.host_end if link else None)
    try:
        _in_thread(lambda: _create(run_dir, name, inside))
        if link is not None:
            _connect(run_dir.netns / name, link)
    except BaseException:
        destroy_namespace(run_dir, name, link.host_end if link else None)
        raise


def destroy_namespace(run_dir: RunDir, name: str, host_end: str | None) -> None:
    """Destroy a namespace; idempotent. Raises OSError."""
    if host_end is not None and interface_exists(host_end):
        with RouteSocket() as links, suppress(OSError):
            links.delete_link(host_end)
    for path, remove in ((run_dir.sysfs / name, Path.rmdir), (run_dir.netns / name, Path.unlink)):
        if path.exists():
            kernel.umount_all(path)
            remove(path)


def namespace_is_mounted(run_dir: RunDir, name: str) -> bool:
    """Whether the namespace is mounted (not just the file it would be mounted on)."""
    path = run_dir.netns / name
    return path.is_file() and path.stat().st_dev != path.parent.stat().st_dev


def run_in_namespace[R](namespace: Path, action: Callable[[], R]) -> R:
    """Run `action` in a thread that has joined a network namespace (setns(2))."""

    def in_namespace() -> R:
        with namespace.open("rb") as handle:
            os.setns(handle.fileno(), os.CLONE_NEWNET)
        return action()

    return _in_thread(in_namespace)


def interface_exists(name: str) -> bool:
    """Whether the calling thread's namespace has an interface of this name."""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def interfaces_with_prefix(prefix: str) -> list[str]:
    """Return the interfaces of the calling thread's namespace with that name prefix."""
    return [name for _, name in socket.if_nameindex() if name.startswith(prefix)]


def delete_links_except(prefix: str, keep: set[str]) -> None:
    """Delete the interfaces with a name prefix, most of which the kernel is deleting already.

    It deletes those of destroyed namespaces together, a hundred in the time that one takes.
    """
    previous, deadline = -1, 0.0
    while leftover := set(interfaces_with_prefix(prefix)) - keep:
        if len(leftover) != previous:
            previous, deadline = len(leftover), time.monotonic() + scaled(_VANISH_SECONDS)
        if time.monotonic() > deadline:
            run_ip_ignoring_errors([f"link delete {name}" for name in sorted(leftover)])
            return
        time.sleep(_VANISH_POLL_SECONDS)


def disconnect_link(link: Link) -> None:
    """Let nothing pass a link until :func:`connect_link`.  Raises OSError."""
    with RouteSocket() as links:
        links.set_down(link.host_end)


def connect_link(link: Link) -> None:
    """Have the host's end of a link up, and the way to its address.  Raises OSError."""
    with RouteSocket() as links:
        links.set_up(link.host_end)
        links.replace_route(IPv4Network(link.address), link.host_end)


def write_sysctl(key: str, value: str, *, optional: bool = False) -> None:
    """Write a network sysctl of the calling thread's namespace; raises OSError.

    `optional` tolerates a kernel without it, such as one booted without IPv6.
    """
    path = Path("/proc/sys") / key
    if optional and not path.exists():
        return
    path.write_text(value)


def run_ip(commands: list[str], *, keep_going: bool = False) -> None:
    """Run `ip -batch` (ip(8)) in the calling thread's namespace; raises CommandFailed.

    With `keep_going`, a failing command does not prevent the next ones.
    """
    argv = ["ip", *(["-force"] if keep_going else []), "-batch", "-"]
    run(argv, input="\n".join(commands).encode() + b"\n", timeout=_TIMEOUT)


def run_ip_ignoring_errors(commands: list[str]) -> None:
    """Run `ip -batch`, ignoring errors: what it removes may be gone already."""
    try:
        run_ip(commands, keep_going=True)
    except HostError as error:
        _log.debug("ignored: %s", error)


def _in_thread[R](action: Callable[[], R]) -> R:
    # The thread ends with the action: a thread that changed its namespace is never reused.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="netns") as pool:
        return pool.submit(action).result()


def _create(run_dir: RunDir, name: str, inside: Callable[[], None]) -> None:
    os.unshare(os.CLONE_NEWNET)
    netns, sysfs = run_dir.netns / name, run_dir.sysfs / name
    netns.touch(mode=0o600)
    kernel.mount("/proc/thread-self/ns/net", netns, None, kernel.MS_BIND)
    for key, value in _SYSCTLS_INSIDE.items():
        write_sysctl(key, value, optional="ipv6" in key)
    _bring_up_loopback()
    sysfs.mkdir(mode=0o755)
    kernel.mount("sysfs", sysfs, "sysfs", _SYSFS_FLAGS)
    inside()


def _bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as handle:
        request = struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING)
        fcntl.ioctl(handle, _SIOCSIFFLAGS, request)


def _connect(namespace: Path, link: Link) -> None:
    host_end = link.host_end
    with RouteSocket() as links:
        links.add_veth(host_end, "eth0", namespace)
        for key, value in (
            (f"net/ipv6/conf/{host_end}/disable_ipv6", "1"),
            (f"net/ipv4/conf/{host_end}/rp_filter", "1"),
            (f"net/ipv4/conf/{host_end}/forwarding", "1" if link.forwarded else "0"),
            (f"net/ipv4/conf/{host_end}/send_redirects", "0"),
            (f"net/ipv4/conf/{host_end}/accept_redirects", "0"),
        ):
            write_sysctl(key, value, optional="ipv6" in key)
        links.set_up(host_end)
        links.replace_route(IPv4Network(link.address), host_end)
    run_in_namespace(namespace, lambda: _configure_inside(link))


def _configure_inside(link: Link) -> None:
    with RouteSocket() as links:
        links.add_address("eth0", link.address)
        links.set_up("eth0")
        links.replace_route(IPv4Network(link.gateway), "eth0", source=link.address)
        everywhere = IPv4Network("0.0.0.0/0")
        links.replace_route(everywhere, "eth0", gateway=link.gateway, source=link.address)
