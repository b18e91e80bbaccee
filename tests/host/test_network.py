"""Slots in a world of namespaces: each mode reaches what it names, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from hostruntime.errors import Conflict, HostFull, InvalidRequest
from hostruntime.host.paths import StatePaths
from hostruntime.host.run import run
from hostruntime.network.egress import EgressProxy, proxy_problems
from hostruntime.network.netns import (
    interface_exists,
    interfaces_with_prefix,
    run_in_namespace,
    run_ip,
    write_sysctl,
)
from hostruntime.network.policy import Policy, PolicyError
from hostruntime.network.slots import Slot, SlotPool
from tests.host.network import (
    HOST_SECOND,
    RESTRICTED,
    SLOTS,
    from_slot,
    listening,
    place,
    refused,
    send_datagram,
    wait_until,
)
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
    UPLINK,
    World,
    ask_resolver,
    hear,
    knock,
    through_proxy,
)

pytestmark = pytest.mark.host


# off --------------------------------------------------------------------------------------


def test_off_has_loopback_alone(slot: Callable[[Policy], Slot]) -> None:
    taken = slot(Policy("off"))
    assert taken.address is None
    assert from_slot(taken, lambda: [name for _, name in socket.if_nameindex()]) == ["lo"]
    assert taken.sysfs is not None
    assert [path.name for path in (taken.sysfs / "class/net").iterdir()] == ["lo"]
    error = refused(taken, lambda: knock(INTERNET, 443))
    assert error.errno == errno.ECONNREFUSED


def test_off_can_serve_itself_on_any_port(slot: Callable[[Policy], Slot]) -> None:
    def serve_and_ask() -> bytes:
        address = ("127.0.0.1", 80)
        with socket.create_server(address) as server, socket.create_connection(address) as client:
            server.accept()[0].sendall(b"hello")
            return client.recv(10)

    assert from_slot(slot(Policy("off")), serve_and_ask) == b"hello"


# restricted -------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [INTERNET, METADATA, HOST, *PRIVATE])
def test_restricted_has_no_way_out_of_its_own(slot: Callable[[Policy], Slot], address: str) -> None:
    taken = slot(RESTRICTED)
    assert hear(INTERNET, 443) == GREETING, "the host itself is not cut off"
    # The kernel may take a second until a new interface carries anything.
    wait_until(lambda: refused(taken, lambda: knock(address, 443)).errno == 111)
    # At once, as somebody says no who is there.
    for _ in range(10):
        assert refused(taken, lambda: knock(address, 443)).errno == 111  # ECONNREFUSED
    refused(taken, lambda: send_datagram(address, 53))


def test_restricted_reaches_one_port_of_the_proxys_address(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool
) -> None:
    taken = slot(RESTRICTED)
    address, port = pool.proxy_address()
    from_slot(taken, lambda: socket.create_connection((address, port), 2).close())
    with socket.create_server((address, 8080)), socket.create_server(("0.0.0.0", 2222)):
        socket.create_connection((address, 8080), 2).close()
        for closed in (8080, 2222, 22, 53):
            refused(taken, partial(knock, address, closed))
    refused(taken, lambda: send_datagram(address, port))


def test_restricted_finds_no_neighbour(slot: Callable[[Policy], Slot]) -> None:
    first = slot(RESTRICTED)
    for other in (slot(RESTRICTED), slot(Policy("open"))):
        with listening(other) as address:
            refused(first, partial(knock, address, 443))


def test_an_interface_that_forwards_by_force_changes_nothing(
    slot: Callable[[Policy], Slot], pool: SlotPool
) -> None:
    taken = slot(RESTRICTED)
    key = f"net/ipv4/conf/{pool.instance.prefix}r{taken.index}/forwarding"
    assert (Path("/proc/sys") / key).read_text() == "0\n"
    write_sysctl(key, "1")
    for address in (INTERNET, METADATA, HOST, *PRIVATE):
        refused(taken, partial(knock, address, 443))
        refused(taken, partial(send_datagram, address, 53))


@pytest.mark.parametrize(
    ("target", "method", "status", "reason"),
    [
        ("allowed.test:443", "CONNECT", 200, "allowed"),
        ("ALLOWED.Test:443", "CONNECT", 200, "allowed"),
        ("allowed.test.:443", "CONNECT", 200, "allowed"),
        ("www.allowed.test:443", "CONNECT", 200, "allowed"),
        ("evil-allowed.test:443", "CONNECT", 403, "not_listed"),
        ("elsewhere.test:443", "CONNECT", 403, "not_listed"),
        ("allowed.test:80", "CONNECT", 403, "bad_port"),
        ("allowed.test:22", "CONNECT", 403, "bad_port"),
        (f"{INTERNET}:443", "CONNECT", 403, "address_literal"),
        ("3405803786:443", "CONNECT", 403, "address_literal"),
        ("private.test:443", "CONNECT", 403, "denied_address"),
        ("mixed.test:443", "CONNECT", 403, "denied_address"),
        ("metadata.test:443", "CONNECT", 403, "denied_address"),
        ("http://allowed.test/", "GET", 403, "not_https"),
        ("http://allowed.test:443/", "GET", 403, "not_https"),
        ("ftp://allowed.test/", "GET", 403, "not_https"),
        ("https://allowed.test/", "GET", 403, "not_https"),
    ],
)
def test_the_proxy_tunnels_to_listed_names_alone_and_says_why_not(
    slot: Callable[[Policy], Slot],
    proxy: EgressProxy,
    pool: SlotPool,
    target: str,
    method: str,
    status: int,
    reason: str,
) -> None:
    taken = slot(RESTRICTED)
    answer = from_slot(taken, lambda: through_proxy(pool.proxy_address(), target, method))
    entry = json.loads((pool.run_dir.entries / f"{taken.address}.json").read_bytes())
    owner = entry["owner"]
    (decision,) = proxy.decisions(owner)
    assert (answer[0], decision.reason, decision.owner) == (status, reason, owner)
    assert decision.verdict == ("allowed" if status == 200 else "refused")
    if status == 200:
        assert answer[1] == GREETING
    else:
        text = answer[1].decode()
        assert text.startswith("Refused by this sandbox's network policy: ")
        assert text.count("\n") == 1
        assert text.endswith(f"{decision.message}.\n")


def test_a_name_that_leads_to_the_host_is_stopped_at_the_connection(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool
) -> None:
    taken = slot(RESTRICTED)
    # An address the running proxy has never heard of: only the firewall can know it.
    run_ip([f"address add {HOST_SECOND}/32 dev {UPLINK}"])
    try:
        with socket.create_server((HOST_SECOND, 443)):
            socket.create_connection((HOST_SECOND, 443), 2).close()
            # The tunnel is promised before it is looked into, so it is cut, not refused.
            refused(taken, lambda: through_proxy(pool.proxy_address(), "local.test:443"))
    finally:
        run_ip([f"address delete {HOST_SECOND}/32 dev {UPLINK}"])


def test_an_allowed_host_that_is_not_there_is_told_apart_from_a_refusal(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool
) -> None:
    taken = slot(RESTRICTED)
    status, text = from_slot(taken, lambda: through_proxy(pool.proxy_address(), "gone.test:443"))
    assert status >= 500
    assert b"gone.test could not be reached" in text


def test_two_containers_have_two_lists(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool
) -> None:
    first = slot(Policy("restricted", ("allowed.test",)))
    second = slot(Policy("restricted", ("elsewhere.test",)))
    nobody = slot(Policy("restricted", ()))
    where = pool.proxy_address()
    statuses = [
        from_slot(taken, partial(through_proxy, where, f"{name}:443"))[0]
        for taken in (first, second, nobody)
        for name in ("allowed.test", "elsewhere.test")
    ]
    assert statuses == [200, 403, 403, 200, 403, 403]


def test_the_default_list_grows_without_a_restart(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool, paths: StatePaths
) -> None:
    taken, before = slot(Policy("restricted")), proxy.processes()
    ask = partial(through_proxy, pool.proxy_address(), "www.allowed.test:443")
    assert from_slot(taken, ask)[0] == 403
    own = paths.root / "egress-allowlist.txt"
    own.write_text("# ours\n*.Allowed.test\n")
    try:
        proxy.refresh()
        assert from_slot(taken, ask)[0] == 200
        own.write_text("https://not.a.domain/\n")
        with pytest.raises(PolicyError, match="without scheme"):
            proxy.refresh()
        assert from_slot(taken, ask)[0] == 200
    finally:
        own.unlink()
        proxy.refresh()
    assert from_slot(taken, ask)[0] == 403
    assert proxy.processes() == before


def test_a_policy_holds_from_the_moment_a_slot_is_acquired_until_it_is_released(
    pool: SlotPool, proxy: EgressProxy
) -> None:
    where = pool.proxy_address()
    for round_ in range(5):
        owner = f"brief.{round_}"
        taken = pool.acquire(owner, Policy("restricted", ("allowed.test",)))
        assert from_slot(taken, lambda: through_proxy(where, "allowed.test:443")[0]) == 200
        with place(taken).open("rb") as kept:
            pool.release(owner)
            assert pool.slot_of(owner) is None
            assert asks_in_vain(kept.fileno(), where)


def asks_in_vain(namespace: int, where: tuple[str, int]) -> bool:
    """Ask from a namespace whose slot was released: refused, or cut off already."""

    def ask() -> int:
        os.setns(namespace, os.CLONE_NEWNET)
        return through_proxy(where, "allowed.test:443", timeout=1.0)[0]

    try:
        return run_in_namespace(Path("/proc/thread-self/ns/net"), ask) == 403
    except OSError:
        return True


def test_only_restricted_slots_find_the_proxy(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool, world: World
) -> None:
    address, port = pool.proxy_address()
    refused(slot(Policy("open")), lambda: knock(address, port))
    run_in_namespace(world.internet, lambda: run_ip([f"route add {address}/32 via {HOST}"]))
    with pytest.raises(OSError, match="timed out"):
        run_in_namespace(world.internet, lambda: knock(address, port, 0.5))


# open -------------------------------------------------------------------------------------


def test_open_reaches_the_outside_under_the_hosts_address(
    slot: Callable[[Policy], Slot], world: World
) -> None:
    taken = slot(Policy("open"))
    for port in (443, 80, 22):
        world.peers.clear()
        assert from_slot(taken, partial(hear, INTERNET, port)) == GREETING
        assert world.peers == [HOST]


def test_open_asks_the_configured_resolver_and_no_other(slot: Callable[[Policy], Slot]) -> None:
    taken = slot(Policy("open"))
    answer = from_slot(taken, lambda: ask_resolver(RESOLVER, "allowed.test"))
    assert answer.endswith(socket.inet_aton(INTERNET))
    assert from_slot(taken, lambda: hear(RESOLVER, 53)) == GREETING
    assert ask_resolver(OTHER_RESOLVER, "allowed.test")
    refused(taken, lambda: ask_resolver(OTHER_RESOLVER, "allowed.test"))
    refused(taken, lambda: knock(OTHER_RESOLVER, 53))


@pytest.mark.parametrize("address", [METADATA, *PRIVATE])
def test_open_does_not_reach_denied_addresses(slot: Callable[[Policy], Slot], address: str) -> None:
    assert hear(address, 80) == GREETING, "the host itself does reach it"
    taken = slot(Policy("open"))
    refused(taken, lambda: knock(address, 80))
    refused(taken, lambda: ask_resolver(address, "allowed.test"))


def test_open_does_not_reach_the_host(slot: Callable[[Policy], Slot], pool: SlotPool) -> None:
    taken = slot(Policy("open"))
    gateway = pool.proxy_address()[0]
    with socket.create_server(("0.0.0.0", 2222)):
        for address in (HOST, gateway):
            socket.create_connection((address, 2222), 2).close()
            refused(taken, partial(knock, address, 2222))


def test_open_does_not_reach_other_slots(slot: Callable[[Policy], Slot]) -> None:
    first = slot(Policy("open"))
    for other in (slot(Policy("open")), slot(RESTRICTED)):
        with listening(other) as address:
            refused(first, partial(knock, address, 443))


def test_nobody_outside_reaches_a_slot(slot: Callable[[Policy], Slot], world: World) -> None:
    for taken in (slot(Policy("open")), slot(RESTRICTED)):
        route = f"route replace {taken.address}/32 via {HOST}"
        run_in_namespace(world.internet, partial(run_ip, [route]))
        with listening(taken) as address, pytest.raises(OSError, match="timed out"):
            run_in_namespace(world.internet, partial(knock, address, 443, 0.5))


def test_a_borrowed_address_goes_nowhere(slot: Callable[[Policy], Slot]) -> None:
    taken, other = slot(Policy("open")), slot(Policy("open"))

    def borrow() -> bytes:
        run_ip([f"address add {other.address}/32 dev eth0"])
        with socket.socket() as handle:
            handle.settimeout(0.5)
            handle.bind((str(other.address), 0))
            handle.connect((INTERNET, 443))
            return handle.recv(100)

    refused(taken, borrow)


def test_tracked_connections_end_with_their_slot(pool: SlotPool, world: World) -> None:
    taken = pool.acquire("tracked", Policy("open"))
    assert from_slot(taken, lambda: hear(INTERNET, 443)) == GREETING
    address = str(taken.address)
    assert address in Path("/proc/thread-self/net/nf_conntrack").read_text()
    pool.release("tracked")
    assert pool.wait_until_idle(10)
    assert address not in Path("/proc/thread-self/net/nf_conntrack").read_text()


CONNECTIONS, BEGINNINGS = 100, 200


@pytest.fixture
def tight(pool: SlotPool) -> Iterator[None]:
    """The firewall with limits that are soon reached."""
    usual = pool.firewall.plan
    beginnings = f"1/second burst {BEGINNINGS} packets"
    pool.firewall.plan = replace(usual, connections=CONNECTIONS, new_connection_rate=beginnings)
    pool.firewall.install()
    yield
    pool.firewall.plan = usual
    pool.firewall.install()


def tracked(address: str | None) -> int:
    """How many connections of an address the host tracks."""
    return Path("/proc/thread-self/net/nf_conntrack").read_text().count(f" src={address} ")


@pytest.mark.usefixtures("tight")
def test_the_connections_of_one_slot_leave_room_in_the_hosts_table(
    slot: Callable[[Policy], Slot],
) -> None:
    hostile, neighbour = slot(Policy("open")), slot(Policy("open"))

    def scatter() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            for port in range(20_000, 20_000 + 3 * CONNECTIONS):
                # Refused, it says so at the next one.
                with suppress(OSError):
                    handle.sendto(b"x", (INTERNET, port))

    from_slot(hostile, scatter)
    assert CONNECTIONS // 2 < tracked(hostile.address) <= CONNECTIONS
    refused(hostile, lambda: knock(INTERNET, 80))
    assert from_slot(neighbour, lambda: hear(INTERNET, 443)) == GREETING
    assert hear(INTERNET, 443) == GREETING


@pytest.mark.usefixtures("tight")
def test_nor_do_those_that_are_over(slot: Callable[[Policy], Slot]) -> None:
    """They stay in the table for a while, and are not counted as its connections any more."""
    hostile, neighbour = slot(Policy("open")), slot(Policy("open"))

    def begin() -> list[bool]:
        made = []
        for _ in range(2 * BEGINNINGS):
            try:
                made.append(hear(INTERNET, 80) == GREETING)
            except ConnectionRefusedError:
                made.append(False)
        return made

    before = time.monotonic()
    made = from_slot(hostile, begin)
    assert CONNECTIONS < sum(made) <= BEGINNINGS + time.monotonic() - before + 1
    assert not all(made)
    assert from_slot(neighbour, lambda: hear(INTERNET, 443)) == GREETING


# every mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "restricted", "open"])
def test_no_mode_speaks_ipv6(slot: Callable[[Policy], Slot], mode: str) -> None:
    taken = slot(Policy.parse(mode))
    listed = from_slot(taken, lambda: run(["ip", "-6", "address"], timeout=10).text)
    assert "eth0" not in listed
    error = refused(taken, lambda: knock("2001:db8::1", 443))
    assert error.errno == 101


@pytest.mark.parametrize("mode", ["off", "restricted", "open"])
def test_a_released_slot_leaves_nothing(pool: SlotPool, mode: str) -> None:
    taken = pool.acquire(f"left.{mode}", Policy.parse(mode))
    assert taken.sysfs is not None
    known = [place(taken), taken.sysfs, pool.run_dir.slots / f"{taken.index}.json"]
    host_ends = [
        n for n in interfaces_with_prefix(pool.instance.prefix) if n.endswith(f"{taken.index}")
    ]
    assert all(path.exists() for path in known)
    pool.release(f"left.{mode}")
    pool.release(f"left.{mode}")
    assert pool.wait_until_idle(10)
    assert not any(path.exists() for path in known)
    exact = f"{pool.instance.prefix}{mode[0]}{taken.index}"
    assert (exact in host_ends) is (mode != "off")
    assert not interface_exists(exact)
    assert not (pool.run_dir.entries / f"{taken.address}.json").exists()


def test_an_owner_has_one_slot_and_a_name_that_is_safe_in_a_path(pool: SlotPool) -> None:
    pool.acquire("one", Policy("off"))
    with pytest.raises(Conflict, match="one"):
        pool.acquire("one", Policy("off"))
    pool.release("one")
    for owner in ("../up", "a/b", "", ".hidden", "x" * 200, "a\nb"):
        with pytest.raises(InvalidRequest):
            pool.acquire(owner, Policy("off"))


def test_slots_run_out_by_name_and_come_back(pool: SlotPool) -> None:
    owners = [f"many.{index}" for index in range(SLOTS)]
    try:
        taken = [pool.acquire(owner, Policy("off")) for owner in owners]
        assert len({slot.id_base for slot in taken}) == SLOTS
        with pytest.raises(HostFull):
            pool.acquire("one.more", Policy("off"))
        pool.release(owners[0])
        pool.acquire("one.more", Policy("off"))
    finally:
        for owner in (*owners, "one.more"):
            pool.release(owner)
    assert pool.wait_until_idle(60)


# What the doctor asks ---------------------------------------------------------------------


def test_this_machine_can_run_the_proxy() -> None:
    assert proxy_problems() == []


# Restarts ---------------------------------------------------------------------------------
