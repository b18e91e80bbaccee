"""A world of network namespaces to test slots in: nothing of the real host's network takes part.

The calling thread moves into a new namespace that plays the host. A second one is the internet,
one hop away, which also holds a metadata address, private ranges and the resolver. Sockets belong
to the namespace they were made in, so servers here are sockets and threads, not processes.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

from hostruntime.host import kernel
from hostruntime.host.run import run
from hostruntime.network.netns import run_in_namespace, run_ip

UPLINK = "up0"
HOST = "203.0.113.1"
INTERNET = "203.0.113.10"
RESOLVER = "203.0.113.53"
OTHER_RESOLVER = "203.0.113.54"
METADATA = "169.254.169.254"
PRIVATE = ("10.99.0.5", "172.16.9.5", "192.168.9.5", "100.64.9.5")
SITE = "registry.test"
GREETING = b"this is the internet\n"


@dataclass
class World:
    """The namespaces, what the resolver answers, and what the internet has heard.

    ``aliases`` are CNAMEs; a name in ``turns`` gets another answer each time it is asked for, with
    no time to live, and its address in ``names`` when they are used up.  ``sites`` are the
    directories that are served over HTTPS, by the names they are asked for with.
    """

    internet: Path
    certificate: Path
    names: dict[str, list[str]]
    asked: list[str] = field(default_factory=list)
    peers: list[str] = field(default_factory=list)
    reached: list[str] = field(default_factory=list)
    aliases: dict[str, str] = field(default_factory=dict)
    turns: dict[str, list[list[str]]] = field(default_factory=dict)
    sites: dict[str, Path] = field(default_factory=dict)


@contextmanager
def a_world(directory: Path) -> Iterator[World]:
    """Enter a host namespace with an internet behind it; leave and forget both at the end."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with ExitStack() as stack:
        stack.callback(os.close, home)
        internet = directory / "internet"
        internet.touch()
        _persist_new_namespace(internet)
        stack.callback(_forget_namespace, internet)
        os.unshare(os.CLONE_NEWNET)
        stack.callback(os.setns, home, os.CLONE_NEWNET)
        _wire(internet)
        world = World(internet, _certificate(directory), {})
        _serve(stack, world)
        yield world


def _certificate(directory: Path) -> Path:
    """A self-signed certificate and its key, as every server of the internet shows it."""
    path = directory / "internet.pem"
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    out = [
        "-days",
        "2",
        "-subj",
        "/CN=internet",
        "-addext",
        f"subjectAltName=DNS:{SITE}",
        "-keyout",
        "-",
        "-out",
        "-",
    ]
    made = run(["openssl", "req", "-x509", *key, *out], timeout=20)
    path.write_bytes(made.stdout)
    return path


def _persist_new_namespace(path: Path) -> None:
    def make() -> None:
        os.unshare(os.CLONE_NEWNET)
        kernel.mount("/proc/thread-self/ns/net", path, None, kernel.MS_BIND)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()


def _forget_namespace(path: Path) -> None:
    kernel.umount(path, kernel.MNT_DETACH)


def _wire(internet: Path) -> None:
    run_ip(
        [
            "link set lo up",
            f"link add {UPLINK} type veth peer name wan netns {internet}",
            f"address add {HOST}/24 dev {UPLINK}",
            f"link set {UPLINK} up",
        ]
    )
    addresses = (INTERNET, RESOLVER, OTHER_RESOLVER, METADATA, *PRIVATE)
    commands = ["link set lo up", "link set wan up"]
    commands += [f"address add {address}/32 dev wan" for address in addresses]
    commands.append("route add 203.0.113.0/24 dev wan")
    # Where packets of a slot would show up if they left without being masqueraded.
    commands.append(f"route add default via {HOST}")
    run_in_namespace(internet, lambda: run_ip(commands))
    run_ip([f"route add default via {INTERNET}"])


def _serve(stack: ExitStack, world: World) -> None:
    for port in (80, 443, 22, 53):
        listener = run_in_namespace(
            world.internet, partial(socket.create_server, ("", port), backlog=1024)
        )
        stack.callback(listener.close)
        _in_background(_greet_over_tls if port == 443 else _greet, listener, world)
    datagrams = run_in_namespace(world.internet, _resolver_socket)
    stack.callback(datagrams.close)
    _in_background(_resolve, datagrams, world)


def _resolver_socket() -> socket.socket:
    handle = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    # Answers must come from the address that was asked.
    handle.setsockopt(socket.IPPROTO_IP, socket.IP_PKTINFO, 1)
    handle.bind(("", 53))
    return handle


@contextmanager
def greeting_at(port: int, namespace: Path | None = None) -> Iterator[None]:
    """Greet on every address of a namespace, the calling thread's own if None."""
    make = partial(socket.create_server, ("", port), backlog=64)
    listener = make() if namespace is None else run_in_namespace(namespace, make)
    _in_background(_greet, listener, World(Path(), Path(), {}))
    try:
        yield
    finally:
        # Closed alone, a socket that somebody waits on goes on listening.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@contextmanager
def hearing_at(port: int, namespace: Path) -> Iterator[list[bytes]]:
    """Take down the datagrams that reach a port of any address of a namespace."""
    heard: list[bytes] = []
    handle = run_in_namespace(namespace, partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
    handle.bind(("", port))
    handle.settimeout(0.05)
    done = threading.Event()

    def listen() -> None:
        while not done.is_set():
            with suppress(TimeoutError):
                heard.append(handle.recv(2048))

    listener = threading.Thread(target=listen)
    listener.start()
    try:
        yield heard
    finally:
        done.set()
        listener.join()
        handle.close()


def _in_background(serve: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=serve, args=arguments, daemon=True).start()


def _greet(listener: socket.socket, world: World) -> None:
    while True:
        try:
            connection, (peer, _) = listener.accept()
        except OSError:
            return
        world.peers.append(peer)
        world.reached.append(connection.getsockname()[0])
        with connection:
            connection.sendall(GREETING)


def _greet_over_tls(listener: socket.socket, world: World) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(world.certificate)
    # Which name it is asked for with (server_name in RFC 6066).
    context.sni_callback = lambda tunnel, name, _: setattr(tunnel, "asked_for", name)
    while True:
        try:
            connection, (peer, _) = listener.accept()
        except OSError:
            return
        world.peers.append(peer)
        world.reached.append(connection.getsockname()[0])
        _in_background(_greet_one_over_tls, connection, context, world)


class _Site(SimpleHTTPRequestHandler):
    """Serves a directory, without a word."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Nobody reads it."""


def _greet_one_over_tls(connection: socket.socket, context: ssl.SSLContext, world: World) -> None:
    with connection, suppress(OSError):
        connection.settimeout(10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(connection, server_side=True) as tunnel:
            site = world.sites.get(getattr(tunnel, "asked_for", None) or "")
            if site is not None:
                _Site(tunnel, ("", 0), None, directory=str(site))  # type: ignore[arg-type]
                return
            tunnel.sendall(GREETING)
            # Asked for so many bytes, it sends them: what a benchmark measures throughput with.
            block = bytes(256 * 1024)
            wanted = int(tunnel.recv(32) or 0)
            for _ in range(wanted // len(block)):
                tunnel.sendall(block)


def _resolve(handle: socket.socket, world: World) -> None:
    while True:
        try:
            query, ancillary, _, peer = handle.recvmsg(2048, 256)
        except OSError:
            return
        handle.sendmsg([_dns_answer(query, world)], ancillary, 0, peer)


def _dns_answer(query: bytes, world: World) -> bytes:
    """Answer A and AAAA questions from the world's names, anything else emptily (RFC 1035)."""
    name, end = _dns_name(query)
    kind = struct.unpack_from("!H", query, end)[0]
    world.asked.append(name)
    records, owner = [], b"\xc0\x0c"
    if target := world.aliases.get(name):
        owner = _dns_labels(target)
        records.append(b"\xc0\x0c" + struct.pack("!HHIH", 5, 1, 60, len(owner)) + owner)
    turns = world.turns.get(name)
    known = turns.pop(0) if turns and kind == 1 else world.names.get(target or name, [])
    for address in known if kind in {1, 28} else []:
        if (":" in address) == (kind == 28):
            data = socket.inet_pton(socket.AF_INET if kind == 1 else socket.AF_INET6, address)
            ttl = 0 if name in world.turns else 60
            records.append(owner + struct.pack("!HHIH", kind, 1, ttl, len(data)) + data)
    code = 0 if known or (target or name) in world.names or name in world.turns else 3
    head = query[:2] + struct.pack("!HHHHH", 0x8180 | code, 1, len(records), 0, 0)
    return head + query[12 : end + 4] + b"".join(records)


def _dns_labels(name: str) -> bytes:
    return b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0"


def _dns_name(query: bytes) -> tuple[str, int]:
    labels, at = [], 12
    while query[at]:
        labels.append(query[at + 1 : at + 1 + query[at]].decode("ascii", "replace").lower())
        at += 1 + query[at]
    return ".".join(labels), at + 1


def ask_resolver(resolver: str, name: str, timeout: float = 1.0) -> bytes:
    """Send one A question by UDP from the calling thread's namespace; return the raw answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.settimeout(timeout)
        handle.connect((resolver, 53))
        handle.send(dns_query(name))
        return handle.recv(2048)


def dns_query(name: str) -> bytes:
    """One A question, as it goes into a datagram."""
    head = struct.pack("!HHHHHH", 7, 0x0100, 1, 0, 0, 0)
    return head + _dns_labels(name) + struct.pack("!HH", 1, 1)


def hear(address: str, port: int, timeout: float = 1.0) -> bytes:
    """Connect by TCP from the calling thread's namespace; return the first bytes it is sent.

    What listens on port 443 speaks TLS.
    """
    with socket.create_connection((address, port), timeout) as connection:
        return in_tls(connection, None) if port == 443 else connection.recv(100)


def in_tls(connection: socket.socket, server_name: str | None) -> bytes:
    """Shake hands naming ``server_name``, whatever the certificate; return what is said first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with context.wrap_socket(connection, server_hostname=server_name) as tunnel:
        return tunnel.recv(100)


def knock(address: str, port: int, timeout: float = 1.0) -> None:
    """Connect by TCP from the calling thread's namespace, which succeeds even at a mute server."""
    socket.create_connection((address, port), timeout).close()


def through_proxy(
    proxy: tuple[str, int],
    target: str,
    method: str = "CONNECT",
    timeout: float = 10.0,
    server_name: str | None = "",
) -> tuple[int, bytes]:
    """Ask the proxy; return the status and what follows: a tunnel's first words, or the body.

    ``server_name`` is the one in the ClientHello: the target's own if blank, none if None.
    """
    with socket.create_connection(proxy, timeout) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(1) or b"\r\n\r\n"
        status = int(head.split()[1])
        if status == 200:
            named = target.rpartition(":")[0].rstrip(".") if server_name == "" else server_name
            return status, in_tls(connection, named)
        length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
        return status, connection.makefile("rb").read(int(length[1]) if length else None)
