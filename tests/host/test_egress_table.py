"""What each mode reaches and what is said of it, as one table; again after everything restarted.

The outside is a world of namespaces of the test's own (:mod:`tests.host.topology`).
"""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from hostruntime.egress import Decision, EgressProxy
from hostruntime.network import Slot, SlotPool
from hostruntime.paths import StatePaths
from hostruntime.policy import Policy
from tests.host.network import SETTINGS, from_slot, send_datagram
from tests.host.network import paths as paths
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
    hear,
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


@dataclass(frozen=True)
class Place:
    """Where a case runs, and what it may need to know."""

    slot: Slot
    proxy: tuple[str, int]
    neighbour: Slot


type Action = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """One attempt: ``expected`` is "reached", "refused" (403), "cut" or "nowhere"."""

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
    """Open a tunnel to a listed host and say something in it that is no TLS."""

    def action(place: Place) -> tuple[int, bytes]:
        with socket.create_connection(place.proxy, 10) as connection:
            connection.sendall(b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
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


def six(address: str) -> Action:
    def action(place: Place) -> tuple[int, bytes]:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as handle:
            handle.settimeout(0.5)
            handle.connect((address, 443))
            return 200, GREETING

    return action


def neighbour(port: int) -> Action:
    return lambda place: (200, hear(str(place.neighbour.address), port))


def proxys_own(offset: int) -> Action:
    return lambda place: knock(place.proxy[0], place.proxy[1] + offset)


R, OPEN, OFF = "restricted", "open", "off"
REACHED, REFUSED, CUT, NOWHERE = "reached", "refused", "cut", "nowhere"
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
    Case("SSH in the tunnel", R, tunnel(b"SSH-2.0-x\r\n"), CUT),
    Case("HTTP in the tunnel", R, tunnel(b"GET / HTTP/1.1\r\nHost: allowed.test\r\n\r\n"), CUT),
    Case("a proxy behind the proxy", R, ask("10.200.0.1:13128"), REFUSED, "address_literal"),
    Case("the proxy's inner port", R, proxys_own(1), NOWHERE),
    Case("another port of the proxy's", R, proxys_own(-5), NOWHERE),
    Case("TCP past the proxy", R, direct(INTERNET, 443), NOWHERE),
    Case("the metadata address", R, direct(METADATA, 80), NOWHERE),
    Case("a private address", R, direct(PRIVATE[0], 80), NOWHERE),
    Case("the host's SSH", R, direct(HOST, 22), NOWHERE),
    Case("a neighbour", R, neighbour(443), NOWHERE),
    Case("DNS by UDP", R, datagram(RESOLVER, 53), NOWHERE),
    Case("DNS by TCP", R, direct(RESOLVER, 53), NOWHERE),
    Case("DNS elsewhere", R, datagram(OTHER_RESOLVER, 53), NOWHERE),
    Case("ICMP", R, ping(INTERNET), NOWHERE),
    Case("IPv6", R, six("2001:db8::10"), NOWHERE),
    Case("the outside", OPEN, direct(INTERNET, 443), REACHED),
    Case("its resolver", OPEN, datagram(RESOLVER, 53), REACHED),
    Case("DNS elsewhere", OPEN, datagram(OTHER_RESOLVER, 53), NOWHERE),
    Case("the metadata address", OPEN, direct(METADATA, 80), NOWHERE),
    *(Case(f"private {address}", OPEN, direct(address, 80), NOWHERE) for address in PRIVATE),
    Case("the host's SSH", OPEN, direct(HOST, 22), NOWHERE),
    Case("a neighbour", OPEN, neighbour(443), NOWHERE),
    Case("the proxy", OPEN, ask("allowed.test:443"), NOWHERE),
    Case("IPv6", OPEN, six("2001:db8::10"), NOWHERE),
    Case("the outside", OFF, direct(INTERNET, 443), NOWHERE),
    Case("DNS", OFF, datagram(RESOLVER, 53), NOWHERE),
    Case("the proxy", OFF, ask("allowed.test:443"), NOWHERE),
    Case("ICMP", OFF, ping(INTERNET), NOWHERE),
]


@pytest.fixture(scope="module", params=["at first", "after a restart of agent and proxy"])
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
    slots = {
        mode: pool.acquire(owner, POLICIES.get(mode, POLICIES["open"]))
        for mode, owner in owners.items()
    }
    if request.param != "at first":
        for pid in proxy.processes():
            os.kill(pid, signal.SIGKILL)
        again = SlotPool(paths, pool.instance, SETTINGS)
        again.setup()
        again.reclaim(set(owners.values()))
        proxy.ensure()
    yield lambda mode: Place(slots[mode], pool.proxy_address(), slots["neighbour"])
    for owner in owners.values():
        pool.release(owner)


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
    decisions = proxy.decisions(f"table.{case.mode}")[before:]
    if case.reason is not None:
        assert decisions[-1].reason == case.reason
        assert_said(case, decisions[-1], said)
    elif case.expected == NOWHERE:
        assert decisions == []


def assert_said(case: Case, decision: Decision, said: bytes) -> None:
    """A refusal says in one line whose it is, which host, and what to do."""
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
