"""What each mode reaches and what is said of it, as one table; again after everything restarted.

The outside is a world of namespaces of the test's own (:mod:`tests.host.topology`).
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import pytest

from hostruntime.host.paths import StatePaths
from hostruntime.network.egress import EgressProxy
from hostruntime.network.netns import write_sysctl
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool
from hostruntime.network.squid_config import OWNER_HEADER
from hostruntime.network.stub_resolver import ADDRESS as STUB
from hostruntime.wire.health import EgressDecision
from tests.host.frames import (
    BROADCAST,
    arp_reply,
    dns_packet,
    mac_of,
    overheard,
    own_mac,
    send_frame,
    send_raw,
    udp_frame,
    udp_packet,
)
from tests.host.network import SETTINGS, from_slot, send_datagram, wait_until
from tests.host.network import paths as paths
from tests.host.network import place as place_of
from tests.host.network import pool as pool
from tests.host.network import proxy as proxy
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import (
    GREETING,
    HOST,
    INTERNET,
    METADATA,
    OTHER_RESOLVER,
    PRIVATE,
    RESOLVER,
    World,
    ask_resolver,
    greeting_at,
    hear,
    hearing_at,
    in_tls,
    knock,
    through_proxy,
)

pytestmark = pytest.mark.host

LISTED = (
    "allowed.test",
    "*.wild.test",
    "bücher.test",
    "private.test",
    "mixed.test",
    "metadata.test",
    "alias.test",
    "six.test",
    "rebinds.test",
)
POLICIES = {
    "off": Policy("off"),
    "restricted": Policy.parse("restricted", LISTED),
    "open": Policy("open"),
}


# Where something listens that must not be reached.
NEIGHBOURS_PORT, HEARING_PORT, OTHER_PORT_OFFSET = 80, 9000, -5


@dataclass(frozen=True)
class Place:
    """Where a case runs, and what it may need to know."""

    slot: Slot
    proxy: tuple[str, int]
    neighbour: Slot
    world: World
    heard: list[bytes]
    recorded: Callable[[str], list[EgressDecision]]

    @property
    def near(self) -> str:
        """The neighbour's address."""
        return str(self.neighbour.address)


type Action = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """One attempt: ``expected`` is "reached", "refused" (403), "cut", "nowhere" or no name."""

    name: str
    mode: str
    action: Action
    expected: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}: {self.name}"


def ask(target: str, method: str = "CONNECT", **options: str | None) -> Action:
    return lambda place: through_proxy(place.proxy, target, method, **options)  # type: ignore[arg-type]


def say(*lines: str) -> Action:
    """Send the proxy a request as it is written here; what comes after 200 is TLS."""

    def action(place: Place) -> tuple[int, bytes]:
        with socket.create_connection(place.proxy, 10) as connection:
            connection.sendall("\r\n".join((*lines, "", "")).encode())
            head = connection.recv(4000)
            status = int(head.split()[1])
            return status, in_tls(connection, "allowed.test") if status == 200 else head

    return action


def tunnel(first: bytes) -> Action:
    """Open a tunnel to a listed host, in another's name, and say something in it that is no TLS."""

    def action(place: Place) -> tuple[int, bytes]:
        with socket.create_connection(place.proxy, 10) as connection:
            claim = f"{OWNER_HEADER}: table.neighbour"
            head = f"CONNECT allowed.test:443 HTTP/1.1\r\n{claim}\r\n\r\n"
            connection.sendall(head.encode())
            status = int(connection.recv(4000).split()[1])
            connection.sendall(first)
            if not (answer := connection.recv(100)):
                raise ConnectionResetError
            return status, answer

    return action


def speaking(*protocols: str) -> Action:
    """Offer application protocols (ALPN, RFC 7301) in a tunnel to a listed host."""

    def action(place: Place) -> tuple[int, bytes]:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(list(protocols))
        with socket.create_connection(place.proxy, 10) as connection:
            connection.sendall(b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
            status = int(connection.recv(4000).split()[1])
            with context.wrap_socket(connection, server_hostname="allowed.test") as inner:
                return status, inner.recv(100)

    return action


def direct(address: str, port: int) -> Action:
    return lambda place: (200, hear(address, port))


def datagram(address: str, port: int) -> Action:
    return lambda place: (200, send_datagram(address, port) and GREETING)


def ping(address: str) -> Action:
    def action(place: Place) -> tuple[int, bytes]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as handle:
            handle.settimeout(0.5)
            handle.connect((address, 0))
            handle.send(b"\x08\0\0\0\0\0\0\x01")
            return 200, handle.recv(100) and GREETING

    return action


def ping_neighbour(place: Place) -> tuple[int, bytes]:
    answer: tuple[int, bytes] = ping(place.near)(place)  # type: ignore[assignment]
    return answer


def six(address: str) -> Action:
    def action(place: Place) -> tuple[int, bytes]:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as handle:
            handle.settimeout(0.5)
            handle.connect((address, 443))
            return 200, GREETING

    return action


def neighbour(port: int) -> Action:
    return lambda place: (200, hear(place.near, port))


def proxys_own(offset: int) -> Action:
    return lambda place: knock(place.proxy[0], place.proxy[1] + offset)


def asked_raw(*, own: bool) -> Action:
    """Ask the resolver from a raw socket, under one's own address or the neighbour's."""

    def action(place: Place) -> tuple[int, bytes]:
        source = str(place.slot.address) if own else place.near
        send_raw(dns_packet(source, RESOLVER, "raw.test"), RESOLVER)
        return 200, noticed(lambda: "raw.test" in place.world.asked)

    return action


def asked_in_frames(*, own: bool) -> Action:
    """Ask the resolver in a frame of one's own making, as oneself or as the neighbour."""

    def action(place: Place) -> tuple[int, bytes]:
        mac = own_mac() if own else from_slot(place.neighbour, own_mac)
        packet = dns_packet(str(place.slot.address) if own else place.near, RESOLVER, "frame.test")
        send_frame(udp_frame((mac_of(place.proxy), mac), packet))
        return 200, noticed(lambda: "frame.test" in place.world.asked)

    return action


def frames_to_the_neighbour(place: Place) -> tuple[int, bytes]:
    """Send the neighbour frames: by way of the host, to itself, to all; as oneself, as the host."""
    far, near = mac_of(place.proxy), from_slot(place.neighbour, own_mac)
    for source in (str(place.slot.address), place.proxy[0], HOST, place.near):
        for target in (far, near, BROADCAST):
            packet = udp_packet(source, place.near, HEARING_PORT, b"forged")
            send_frame(udp_frame((target, own_mac()), packet))
    return 200, noticed(lambda: b"forged" in place.heard)


def the_neighbours_address(place: Place) -> tuple[int, bytes]:
    """Claim it by ARP for oneself, as loudly as one can; is anything that is for it sent here?"""

    def meanwhile() -> None:
        for told in (place.proxy[0], place.near, str(place.slot.address)):
            send_frame(arp_reply(own_mac(), place.near, told))
        assert from_slot(place.neighbour, lambda: hear(INTERNET, 443)) == GREETING

    if overheard(place.near, meanwhile):
        return 200, GREETING
    raise TimeoutError("nothing was sent here")


def noticed(condition: Callable[[], bool]) -> bytes:
    """Wait a little for it; TimeoutError if it does not come true."""
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        if condition():
            return GREETING
        time.sleep(0.02)
    raise TimeoutError("nobody heard of it")


def knows_no(name: str) -> Action:
    """Ask the container's own resolver; all it says is that there is no such name."""

    def action(place: Place) -> tuple[int, bytes]:
        # NXDOMAIN, the question, and no record (RFC 1035, section 4.1.1).
        said = (0x8183, 1, 0, 0, 0)
        answer = ask_resolver(STUB, name)
        wait_until(lambda: bool(place.recorded(name)))
        found = struct.unpack_from("!HHHHH", answer, 2) == said and not place.world.asked
        return (0 if found else 200), answer

    return action


R, OPEN, OFF = "restricted", "open", "off"
REACHED, REFUSED, CUT, NOWHERE = "reached", "refused", "cut", "nowhere"
NO_NAME = "0"
TABLE = [
    Case("a listed host", R, ask("allowed.test:443"), REACHED, "allowed"),
    Case("in capitals", R, ask("ALLOWED.Test:443"), REACHED, "allowed"),
    Case("with a final dot", R, ask("allowed.test.:443"), REACHED, "allowed"),
    Case("a subdomain", R, ask("www.allowed.test:443"), REACHED, "allowed"),
    Case("an international name", R, ask("xn--bcher-kva.test:443"), REACHED, "allowed"),
    Case("below a wildcard", R, ask("a.b.wild.test:443"), REACHED, "allowed"),
    Case("HTTP/2 in the tunnel", R, speaking("h2", "http/1.1"), REACHED, "allowed"),
    Case("a WebSocket in the tunnel", R, speaking("http/1.1"), REACHED, "allowed"),
    Case("a borrowed ending", R, ask("evil-allowed.test:443"), REFUSED, "not_listed"),
    Case("a borrowed beginning", R, ask("allowed.test.evil.test:443"), REFUSED, "not_listed"),
    Case("a listed host's parent", R, ask("test:443"), REFUSED, "not_listed"),
    Case("another host", R, ask("elsewhere.test:443"), REFUSED, "not_listed"),
    Case("the wildcard beside", R, ask("evilwild.test:443"), REFUSED, "not_listed"),
    Case("port 80", R, ask("allowed.test:80"), REFUSED, "bad_port"),
    Case("port 22", R, ask("allowed.test:22"), REFUSED, "bad_port"),
    Case("port 8443", R, ask("allowed.test:8443"), REFUSED, "bad_port"),
    Case("an address", R, ask(f"{INTERNET}:443"), REFUSED, "address_literal"),
    Case("a decimal address", R, ask("3405803786:443"), REFUSED, "address_literal"),
    Case("a hexadecimal address", R, ask("0xcb00710a:443"), REFUSED, "address_literal"),
    Case("an octal address", R, ask("0313.0.0161.012:443"), REFUSED, "address_literal"),
    Case("an IPv6 address", R, ask("[2001:db8::10]:443"), REFUSED, "address_literal"),
    Case("a mapped address", R, ask("[::ffff:203.0.113.10]:443"), REFUSED, "address_literal"),
    Case("a name of a private address", R, ask("private.test:443"), REFUSED, "denied_address"),
    Case("a name of both", R, ask("mixed.test:443"), REFUSED, "denied_address"),
    Case("a name of the metadata", R, ask("metadata.test:443"), REFUSED, "denied_address"),
    Case("an alias of a private one", R, ask("alias.test:443"), REFUSED, "denied_address"),
    Case("a name of a local IPv6 address", R, ask("six.test:443"), REFUSED, "denied_address"),
    Case("plain HTTP", R, ask("http://allowed.test/", "GET"), REFUSED, "not_https"),
    Case("plain HTTP on 443", R, ask("http://allowed.test:443/", "GET"), REFUSED, "not_https"),
    Case("a POST", R, ask("http://allowed.test/", "POST"), REFUSED, "not_https"),
    Case("FTP", R, ask("ftp://allowed.test/", "GET"), REFUSED, "not_https"),
    Case("HTTPS by the proxy", R, ask("https://allowed.test/", "GET"), REFUSED, "not_https"),
    Case(
        "another Host header",
        R,
        say("CONNECT elsewhere.test:443 HTTP/1.1", "Host: allowed.test"),
        REFUSED,
        "not_listed",
    ),
    Case(
        "under a false address",
        R,
        say("CONNECT elsewhere.test:443 HTTP/1.1", "X-Forwarded-For: 127.0.0.1"),
        REFUSED,
        "not_listed",
    ),
    Case(
        "domain fronting",
        R,
        ask("allowed.test:443", server_name="elsewhere.test"),
        CUT,
        "server_name_differs",
    ),
    Case("no server name", R, ask("allowed.test:443", server_name=None), CUT, "no_server_name"),
    Case("SSH in the tunnel", R, tunnel(b"SSH-2.0-x\r\n"), CUT, "not_tls"),
    Case(
        "HTTP in the tunnel",
        R,
        tunnel(b"GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n"),
        CUT,
        "not_tls",
    ),
    Case("a proxy behind the proxy", R, ask("10.200.0.1:13128"), REFUSED, "address_literal"),
    Case("the proxy's inner port", R, proxys_own(1), NOWHERE),
    Case("another port of the proxy's", R, proxys_own(OTHER_PORT_OFFSET), NOWHERE),
    Case("TCP past the proxy", R, direct(INTERNET, 443), NOWHERE),
    Case("the metadata address", R, direct(METADATA, 80), NOWHERE),
    Case("a private address", R, direct(PRIVATE[0], 80), NOWHERE),
    Case("the host's SSH", R, direct(HOST, 22), NOWHERE),
    Case("a neighbour", R, neighbour(80), NOWHERE),
    Case("its resolver, for a host", R, knows_no("other.test"), NO_NAME, "not_listed"),
    Case("its resolver, for a listed host", R, knows_no("allowed.test"), NO_NAME, "past_proxy"),
    Case("its resolver by TCP", R, direct(STUB, 53), NOWHERE),
    Case("DNS by UDP", R, datagram(RESOLVER, 53), NOWHERE),
    Case("DNS by TCP", R, direct(RESOLVER, 53), NOWHERE),
    Case("DNS elsewhere", R, datagram(OTHER_RESOLVER, 53), NOWHERE),
    Case("DNS elsewhere by TCP", R, direct(OTHER_RESOLVER, 53), NOWHERE),
    Case("ICMP", R, ping(INTERNET), NOWHERE),
    Case("ICMP to a neighbour", R, ping_neighbour, NOWHERE),
    Case("ICMP to the host", R, ping(HOST), NOWHERE),
    Case("a raw socket", R, asked_raw(own=True), NOWHERE),
    Case("a raw socket as a neighbour", R, asked_raw(own=False), NOWHERE),
    Case("a frame", R, asked_in_frames(own=True), NOWHERE),
    Case("a frame as a neighbour", R, asked_in_frames(own=False), NOWHERE),
    Case("frames to a neighbour", R, frames_to_the_neighbour, NOWHERE),
    Case("a neighbour's address by ARP", R, the_neighbours_address, NOWHERE),
    Case("IPv6", R, six("2001:db8::10"), NOWHERE),
    Case("the outside", OPEN, direct(INTERNET, 443), REACHED),
    Case("its resolver", OPEN, datagram(RESOLVER, 53), REACHED),
    Case("its resolver by TCP", OPEN, direct(RESOLVER, 53), REACHED),
    Case("the others' resolver", OPEN, knows_no("allowed.test"), NOWHERE),
    Case("DNS elsewhere", OPEN, datagram(OTHER_RESOLVER, 53), NOWHERE),
    Case("DNS elsewhere by TCP", OPEN, direct(OTHER_RESOLVER, 53), NOWHERE),
    Case("ICMP", OPEN, ping(INTERNET), REACHED),
    Case("ICMP to the metadata", OPEN, ping(METADATA), NOWHERE),
    Case("ICMP to a private address", OPEN, ping(PRIVATE[0]), NOWHERE),
    Case("ICMP to a neighbour", OPEN, ping_neighbour, NOWHERE),
    Case("ICMP to the host", OPEN, ping(HOST), NOWHERE),
    Case("a raw socket", OPEN, asked_raw(own=True), REACHED),
    Case("a raw socket as a neighbour", OPEN, asked_raw(own=False), NOWHERE),
    Case("a frame", OPEN, asked_in_frames(own=True), REACHED),
    Case("a frame as a neighbour", OPEN, asked_in_frames(own=False), NOWHERE),
    Case("frames to a neighbour", OPEN, frames_to_the_neighbour, NOWHERE),
    Case("a neighbour's address by ARP", OPEN, the_neighbours_address, NOWHERE),
    Case("the metadata address", OPEN, direct(METADATA, 80), NOWHERE),
    *(Case(f"private {address}", OPEN, direct(address, 80), NOWHERE) for address in PRIVATE),
    Case("the host's SSH", OPEN, direct(HOST, 22), NOWHERE),
    Case("a neighbour", OPEN, neighbour(80), NOWHERE),
    Case("the proxy", OPEN, ask("allowed.test:443"), NOWHERE),
    Case("IPv6", OPEN, six("2001:db8::10"), NOWHERE),
    Case("the outside", OFF, direct(INTERNET, 443), NOWHERE),
    Case("its own resolver", OFF, knows_no("allowed.test"), NO_NAME, "network_off"),
    Case("DNS", OFF, datagram(RESOLVER, 53), NOWHERE),
    Case("the proxy", OFF, ask("allowed.test:443"), NOWHERE),
    Case("ICMP", OFF, ping(INTERNET), NOWHERE),
]


# Those of which the firewall has something to tell.
PAST = [
    case
    for case in TABLE
    if case.mode == R
    and case.name
    in {
        "TCP past the proxy",
        "the metadata address",
        "a private address",
        "the host's SSH",
        "a neighbour",
        "DNS by UDP",
        "DNS by TCP",
    }
]


@pytest.fixture(
    scope="module", params=["at first", "taken over", "after a restart of agent and proxy"]
)
def place(
    request: pytest.FixtureRequest,
    world: World,
    pool: SlotPool,
    paths: StatePaths,
    proxy: EgressProxy,
) -> Iterator[Callable[[str], Place]]:
    """One slot of each mode, which lived through what the parameter says."""
    world.names |= {
        "xn--bcher-kva.test": [INTERNET],
        "a.b.wild.test": [INTERNET],
        "six.test": ["fd00::5"],
        "rebinds.test": [PRIVATE[0]],
    }
    world.aliases["alias.test"] = "private.test"
    owners = {mode: f"table.{mode}" for mode in (*POLICIES, "neighbour")}
    policies = {mode: POLICIES.get(mode, POLICIES["open"]) for mode in owners}
    if request.param == "taken over":
        # As a sandbox takes over the slot of a warm container, whose list of domains is another.
        for mode, policy in policies.items():
            domains = ["other.test"] if policy.mode == "restricted" else None
            pool.acquire(f"warm.{mode}", Policy.parse(policy.mode, domains))
        slots = {
            mode: pool.reassign(f"warm.{mode}", owner, policies[mode])
            for mode, owner in owners.items()
        }
    else:
        slots = {mode: pool.acquire(owner, policies[mode]) for mode, owner in owners.items()}
    if request.param == "after a restart of agent and proxy":
        for pid in proxy.processes():
            os.kill(pid, signal.SIGKILL)
        pool.resolver.close()
        again = SlotPool(paths, pool.instance, SETTINGS)
        request.addfinalizer(again.close)
        again.setup()
        again.reclaim(set(owners.values()))
        proxy.ensure()
    with listeners(pool, slots["neighbour"]) as heard:
        # So that the firewall decides, and not that its interface forwards nothing.
        end = f"{pool.instance.prefix}r{slots['restricted'].index}"
        write_sysctl(f"net/ipv4/conf/{end}/forwarding", "1")
        where, near = pool.proxy_address(), slots["neighbour"]

        def at(mode: str) -> Place:
            owner = owners[mode]
            return Place(
                slots[mode],
                where,
                near,
                world,
                heard,
                lambda host: [one for one in proxy.decisions(owner) if one.host == host],
            )

        yield at
    for owner in owners.values():
        pool.release(owner)


@contextmanager
def listeners(pool: SlotPool, near: Slot) -> Iterator[list[bytes]]:
    """Have something listen, as can be told from beside it, wherever cases must not get to."""
    address, port = pool.proxy_address()
    other = port + OTHER_PORT_OFFSET
    with ExitStack() as stack:
        stack.enter_context(greeting_at(22))
        stack.enter_context(greeting_at(other))
        stack.enter_context(greeting_at(NEIGHBOURS_PORT, near.netns))
        heard = stack.enter_context(hearing_at(HEARING_PORT, place_of(near)))
        assert {hear(HOST, 22), hear(address, other)} == {GREETING}
        assert from_slot(near, lambda: hear(str(near.address), NEIGHBOURS_PORT)) == GREETING
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            handle.sendto(b"control", (str(near.address), HEARING_PORT))
        wait_until(lambda: heard == [b"control"])
        yield heard


@pytest.fixture(autouse=True)
def nothing_asked_yet(world: World) -> None:
    world.asked.clear()


def outcome(place: Place, action: Action) -> tuple[str, bytes]:
    try:
        answer = from_slot(place.slot, partial(action, place))
    except (ssl.SSLError, ConnectionResetError) as error:
        return CUT, str(error).encode()
    except OSError as error:
        return NOWHERE, str(error).encode()
    status, said = answer if isinstance(answer, tuple) else (200, b"")
    return (REFUSED if status == 403 else REACHED if said == GREETING else str(status)), said


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_what_is_reached_and_what_is_said(
    case: Case, place: Callable[[str], Place], proxy: EgressProxy
) -> None:
    where = place(case.mode)
    before = len(proxy.decisions(f"table.{case.mode}"))
    found, said = outcome(where, case.action)
    assert found == case.expected, said
    if case.reason == "not_tls":
        # Squid writes it down when it has let go of the connection.
        wait_until(lambda: proxy.decisions(f"table.{R}")[-1].reason == "not_tls", 5)
    decisions = proxy.decisions(f"table.{case.mode}")[before:]
    if case.reason is not None:
        assert decisions[-1].reason == case.reason
        assert_said(case, decisions[-1], said)
    elif case.expected == NOWHERE:
        assert all(one.direct and one.verdict == "refused" for one in decisions)
        assert (case in PAST) <= bool(decisions)


def assert_said(case: Case, decision: EgressDecision, said: bytes) -> None:
    """A refusal says in one line whose it is, which host, and what to do."""
    if case.expected == NO_NAME:
        assert decision.direct
        assert decision.verdict == ("unreached" if case.reason == "past_proxy" else "refused")
        return
    assert decision.verdict == ("allowed" if case.expected == REACHED else "refused")
    if case.expected == REFUSED:
        line = said.rpartition(b"\r\n\r\n")[2].decode()
        assert line == f"Refused by this sandbox's network policy: {decision.message}.\n"


def test_the_table_is_large_enough() -> None:
    assert len(TABLE) >= 40
    assert len({str(case) for case in TABLE}) == len(TABLE)


def test_a_name_that_moves_between_check_and_connection_reaches_nothing(
    place: Callable[[str], Place], world: World
) -> None:
    where = place("restricted")
    for _ in range(5):
        world.turns["rebinds.test"] = [[INTERNET], [PRIVATE[0]], [PRIVATE[0]]]
        heard = len(world.reached)
        found, said = outcome(where, ask("rebinds.test:443"))
        # Whatever was answered, only the address that was checked may have heard of it.
        assert found in {REACHED, REFUSED, CUT}, said
        assert PRIVATE[0] not in world.reached[heard:]
