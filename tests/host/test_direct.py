"""What goes past the proxy is recorded: the resolver that knows no name, in slots of a world."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.run import run
from hostruntime.network import blackhole, firewall
from hostruntime.network.direct import MAX_LOG_BYTES
from hostruntime.network.egress import EgressProxy
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool
from hostruntime.network.stub_resolver import ADDRESS, BURST, PER_SECOND, PORT
from tests.host.network import (
    HOST_SECOND,
    RESTRICTED,
    SETTINGS,
    SLOTS,
    from_slot,
    place,
    refused,
    send_datagram,
    wait_until,
)
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import (
    HOST,
    INTERNET,
    METADATA,
    PRIVATE,
    RESOLVER,
    World,
    ask_resolver,
    dns_query,
    hear,
)

pytestmark = pytest.mark.host

OFF = Policy("off")
FLOOD = 20_000


@pytest.fixture(scope="module")
def records(pool: SlotPool, paths: StatePaths) -> EgressProxy:
    """Reads what is recorded; the proxy itself does not run."""
    return EgressProxy(paths, pool.instance, pool)


def attended(pool: SlotPool) -> set[Path]:
    """The namespaces that a pool's resolver answers in."""
    return set(pool.resolver._clients)


def test_an_address_that_is_tried_is_refused_and_recorded(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy, world: World
) -> None:
    mine, near = slot(RESTRICTED), slot(RESTRICTED)
    owner, heard = owner_of(pool, mine), len(world.reached)
    # The kernel may take a second until a new interface carries anything.
    wait_until(lambda: isinstance(refused(mine, partial(hear, INTERNET, 443)), ConnectionError))
    began = time.monotonic()
    refused(mine, lambda: hear(INTERNET, 443))
    assert time.monotonic() - began < 0.5
    refused(mine, lambda: send_datagram(PRIVATE[0], 4000))
    found = {(one.method, one.host, one.port): one for one in records.decisions(owner)}
    assert set(found) == {("TCP", INTERNET, 443), ("UDP", PRIVATE[0], 4000)}
    for one in found.values():
        assert (one.verdict, one.reason, one.direct) == ("refused", "past_proxy", True)
        assert "$HTTPS_PROXY" in one.message
    # Once each, whoever asks again; and again if it is tried again.
    assert len(records.decisions(owner)) == 2
    refused(mine, lambda: hear(INTERNET, 443))
    assert [one.refused for one in records.hosts(owner) if one.host == INTERNET] == [2]
    assert records.decisions(owner_of(pool, near)) == []
    assert len(world.reached) == heard


def test_without_the_firewall_a_restricted_slot_reaches_nothing_either(
    pool: SlotPool, slot: Callable[[Policy], Slot], world: World
) -> None:
    mine, heard = slot(RESTRICTED), len(world.reached)
    run(["nft", "delete", "table", "inet", pool.instance.nft_table], timeout=10)
    try:
        refused(mine, lambda: hear(INTERNET, 443))
        refused(mine, partial(ask_resolver, RESOLVER, "elsewhere.test"))
        world.asked.clear()
    finally:
        pool.firewall.ensure_present()
    assert len(world.reached) == heard


def test_a_scan_fills_nobody_elses_record(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    noisy, quiet = slot(RESTRICTED), slot(RESTRICTED)

    def scan() -> float:
        began = time.monotonic()
        for port in range(1, FLOOD):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
                handle.sendto(b"?", (INTERNET, port))
        return time.monotonic() - began

    took = from_slot(noisy, scan)
    refused(quiet, lambda: hear(INTERNET, 443))
    assert [one.port for one in records.decisions(owner_of(pool, quiet))] == [443]
    assert 16 <= len(records.decisions(owner_of(pool, noisy))) <= 40 + took


def test_with_network_off_what_was_tried_is_known_when_the_slot_is_gone(
    pool: SlotPool, records: EgressProxy
) -> None:
    mine = pool.acquire("off.first", OFF)
    refused(mine, lambda: hear(INTERNET, 443))
    pool.release("off.first")
    assert pool.wait_until_idle(30)
    assert [one.host for one in records.decisions("off.first")] == [INTERNET]


def test_what_was_tried_is_its_owners_when_the_address_is_anothers(
    pool: SlotPool, records: EgressProxy
) -> None:
    mine = pool.acquire("tried.first", RESTRICTED)
    refused(mine, lambda: hear(INTERNET, 443))
    pool.release("tried.first")
    assert pool.wait_until_idle(30)
    names = [f"tried.{number}" for number in range(SLOTS)]
    try:
        given = [pool.acquire(name, RESTRICTED).address for name in names[: SLOTS - 8]]
        assert mine.address in given
        heirs = names[given.index(mine.address)]
        assert records.decisions(heirs) == []
        assert [one.host for one in records.decisions("tried.first")] == [INTERNET]
    finally:
        for name in names:
            pool.release(name)
        assert pool.wait_until_idle(60)


def test_with_network_off_what_is_tried_is_refused_at_once_and_recorded(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy, world: World
) -> None:
    mine, near = slot(OFF), slot(OFF)
    owner, heard = owner_of(pool, mine), len(world.reached)
    began = time.monotonic()
    for address, port in ((INTERNET, 443), (HOST, 443), (pool.proxy_address()[0], 13128)):
        assert isinstance(refused(mine, partial(hear, address, port)), ConnectionError)
    for address in (PRIVATE[0], RESOLVER, METADATA):
        refused(mine, partial(send_datagram, address, 4000))
    refused(mine, partial(send_datagram, "224.0.0.251", 5353))
    assert time.monotonic() - began < 0.5
    found = records.decisions(owner)
    assert {(one.method, one.host, one.port) for one in found} == {
        ("TCP", INTERNET, 443),
        ("TCP", HOST, 443),
        ("TCP", pool.proxy_address()[0], 13128),
        ("UDP", PRIVATE[0], 4000),
        ("UDP", RESOLVER, 4000),
        ("UDP", METADATA, 4000),
    }
    assert {(one.verdict, one.reason, one.direct) for one in found} == {
        ("refused", "network_off", True)
    }
    assert all("network off" in one.message for one in found)
    assert len(records.decisions(owner)) == len(found)
    refused(mine, lambda: hear(INTERNET, 443))
    assert [one.refused for one in records.hosts(owner) if one.host == INTERNET] == [2]
    assert records.decisions(owner_of(pool, near)) == []
    assert len(world.reached) == heard


def test_with_network_off_nothing_gets_out_without_the_table_either(
    pool: SlotPool, slot: Callable[[Policy], Slot], world: World
) -> None:
    mine, heard = slot(OFF), len(world.reached)
    links = json.loads(from_slot(mine, lambda: run(["ip", "-j", "link"], timeout=10)).stdout)
    assert [link["ifname"] for link in links] == ["lo"]
    arrived = received(HOST_SECOND)
    from_slot(mine, lambda: run(["nft", "flush", "ruleset"], timeout=10))
    for address, port in ((INTERNET, 443), (HOST, 443), (pool.proxy_address()[0], 13128)):
        refused(mine, partial(hear, address, port))
    for address in (PRIVATE[0], RESOLVER, METADATA, HOST_SECOND, "127.0.0.1"):
        refused(mine, partial(send_datagram, address, 4000))
    assert len(world.reached) == heard
    assert received(HOST_SECOND) == arrived
    # A new agent finds the table gone.
    from_slot(mine, lambda: blackhole.install_blackhole(pool.nft))
    assert isinstance(refused(mine, lambda: hear(INTERNET, 443)), ConnectionError)


def received(address: str) -> int:
    """Packets for addresses that are not its own, or forwarded, that this world's host has seen."""
    text = Path("/proc/net/snmp").read_text().splitlines()
    names, values = (line.split()[1:] for line in text if line.startswith("Ip:"))
    counted = dict(zip(names, map(int, values), strict=True))
    return counted["ForwDatagrams"] + counted["InAddrErrors"]


def test_with_network_off_who_sends_nothing_costs_no_look(
    pool: SlotPool,
    slot: Callable[[Policy], Slot],
    records: EgressProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[str] = []
    take = firewall.drain_attempts

    def counted(table: str, family: str = "inet") -> list[firewall.Attempt]:
        looked.append(family)
        return take(table, family)

    monkeypatch.setattr(firewall, "drain_attempts", counted)
    silent, busy = slot(OFF), slot(OFF)
    # The slots of tests before are looked at as they go, in the background.
    assert pool.wait_until_idle(60)
    looked.clear()
    assert records.decisions(owner_of(pool, silent)) == []
    assert "ip" not in looked
    refused(busy, partial(send_datagram, PRIVATE[0], 4000))
    assert [one.port for one in records.decisions(owner_of(pool, busy))] == [4000]
    assert looked.count("ip") == 1


def test_with_network_off_a_scan_is_bounded_and_loopback_is_free(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    mine = slot(OFF)

    def scan() -> float:
        began = time.monotonic()
        for port in range(1, FLOOD):
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle,
                suppress(PermissionError),
            ):
                handle.sendto(b"?", (INTERNET, port))
        return time.monotonic() - began

    took = from_slot(mine, scan)
    found = records.decisions(owner_of(pool, mine))
    assert 16 <= len(found) <= min(40 + took, blackhole.MAX_ATTEMPTS)

    def serve_and_ask() -> bytes:
        with (
            socket.create_server(("0.0.0.0", 8080)) as server,
            socket.create_connection(("127.9.9.9", 8080), 5) as client,
        ):
            server.accept()[0].sendall(b"mine")
            return client.recv(10)

    assert from_slot(mine, serve_and_ask) == b"mine"
    assert len(records.decisions(owner_of(pool, mine))) == len(found)


def owner_of(pool: SlotPool, taken: Slot) -> str:
    return next(owner for owner, slot in pool._assigned.items() if slot == taken)


def asks(taken: Slot, name: str) -> int:
    """Ask the slot's resolver; the answer's code (RFC 1035, section 4.1.1)."""
    answer = from_slot(taken, partial(ask_resolver, ADDRESS, name))
    return int(struct.unpack_from("!H", answer, 2)[0]) & 0x000F


@pytest.mark.parametrize(
    ("policy", "name", "verdict", "reason"),
    [
        (RESTRICTED, "elsewhere.test", "refused", "not_listed"),
        (RESTRICTED, "www.allowed.test", "unreached", "past_proxy"),
        (OFF, "elsewhere.test", "refused", "network_off"),
    ],
)
def test_a_name_is_denied_to_exist_and_recorded(
    pool: SlotPool,
    slot: Callable[[Policy], Slot],
    records: EgressProxy,
    world: World,
    policy: Policy,
    name: str,
    verdict: str,
    reason: str,
) -> None:
    world.asked.clear()
    mine, near = slot(policy), slot(policy)
    owner = owner_of(pool, mine)
    assert asks(mine, name) == 3
    wait_until(lambda: bool(records.decisions(owner)))
    (found,) = records.decisions(owner)
    assert (found.host, found.port, found.method, found.direct) == (name, 0, "DNS", True)
    assert (found.verdict, found.reason, found.owner) == (verdict, reason, owner)
    (use,) = records.hosts(owner)
    assert (use.direct, use.refused, use.unreached) == (
        True,
        verdict == "refused",
        reason[0] == "p",
    )
    assert records.decisions(owner_of(pool, near)) == []
    assert world.asked == []


def test_open_has_its_own_resolver_and_a_free_slot_records_nothing(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    refused(slot(Policy("open")), partial(ask_resolver, ADDRESS, "elsewhere.test"))
    assert pool.wait_until_idle(30)
    before = sorted(path.name for path in pool.run_dir.direct.iterdir())
    assert asks(pool._ready["restricted"][0], "elsewhere.test") == 3
    mine = slot(RESTRICTED)
    assert asks(mine, "later.test") == 3
    owner = owner_of(pool, mine)
    wait_until(lambda: bool(records.decisions(owner)))
    after = sorted(path.name for path in pool.run_dir.direct.iterdir())
    assert after == sorted([*before, f"{owner}.ndjson"])
    assert [one.host for one in records.decisions(owner)] == ["later.test"]


def test_both_kinds_of_address_are_one_question(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    mine = slot(RESTRICTED)

    def ask_both() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            handle.settimeout(5)
            handle.connect((ADDRESS, PORT))
            for kind in (1, 28):
                handle.send(dns_query("pair.test")[:-4] + struct.pack("!HH", kind, 1))
            for _ in range(2):
                handle.recv(512)

    for _ in range(3):
        from_slot(mine, ask_both)
    assert asks(mine, "last.test") == 3
    wait_until(lambda: "last.test" in str(records.decisions(owner_of(pool, mine))))
    found = [one.host for one in records.decisions(owner_of(pool, mine))]
    assert found == ["pair.test"] * 3 + ["last.test"]


def test_a_flood_is_bounded_and_the_neighbours_own(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    noisy, quiet = slot(RESTRICTED), slot(RESTRICTED)

    def flood() -> float:
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            for number in range(FLOOD):
                handle.sendto(dns_query(f"n{number}.flood.test"), (ADDRESS, PORT))
        return time.monotonic() - began

    took = from_slot(noisy, flood)
    began = time.monotonic()
    assert asks(quiet, "calm.test") == 3
    assert time.monotonic() - began < 0.5
    recorded = len(records.decisions(owner_of(pool, noisy)))
    assert BURST / 2 < recorded <= BURST + (took + 2) * PER_SECOND
    assert (pool.run_dir.direct / f"{owner_of(pool, noisy)}.ndjson").stat().st_size < MAX_LOG_BYTES
    wait_until(lambda: len(records.decisions(owner_of(pool, quiet))) == 1)
    # It is heard again when it has been quiet itself.
    wait_until(lambda: _answered(noisy, "sorry.test"))


def _answered(taken: Slot, name: str) -> bool:
    try:
        return asks(taken, name) == 3
    except TimeoutError:
        return False


def test_a_record_has_a_largest_size(
    pool: SlotPool, slot: Callable[[Policy], Slot], records: EgressProxy
) -> None:
    mine = slot(RESTRICTED)
    record = pool.run_dir.direct / f"{owner_of(pool, mine)}.ndjson"
    assert asks(mine, "first.test") == 3
    wait_until(record.exists)
    with record.open("a") as log:
        log.write("\n" * MAX_LOG_BYTES)
    size = record.stat().st_size
    for _ in range(3):
        assert asks(mine, "second.test") == 3
    near = slot(RESTRICTED)
    assert asks(near, "other.test") == 3
    wait_until(lambda: bool(records.decisions(owner_of(pool, near))))
    assert record.stat().st_size == size


def test_a_resolver_of_the_containers_own_finds_room(slot: Callable[[Policy], Slot]) -> None:
    mine = slot(RESTRICTED)

    def serve() -> bytes:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            handle.bind(("0.0.0.0", PORT))
            handle.settimeout(5)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"own", ("127.0.0.1", PORT))
                return handle.recv(10)

    assert from_slot(mine, serve) == b"own"
    assert asks(mine, "elsewhere.test") == 3


def test_a_new_agent_answers_for_the_living_and_nothing_holds_a_namespace(
    world: World, tmp_path: Path
) -> None:
    paths = StatePaths(tmp_path / "state").ensure()
    first = SlotPool(paths, claim_instance(paths), SETTINGS)
    second = SlotPool(paths, first.instance, SETTINGS)
    records = EgressProxy(paths, first.instance, second)
    try:
        first.setup()
        first.reclaim(set())
        taken = {name: first.acquire(name, RESTRICTED) for name in ("kept", "dead")}
        taken["off"] = first.acquire("off", OFF)
        refused(taken["off"], lambda: hear(INTERNET, 443))
        assert asks(taken["kept"], "before.test") == 3
        first.close()
        assert attended(first) == set()
        refused(taken["kept"], partial(ask_resolver, ADDRESS, "meanwhile.test"))
        # As whoever turns the host's own off and on would.
        end = f"{first.instance.prefix}r{taken['kept'].index}"
        forwards = Path(f"/proc/sys/net/ipv4/conf/{end}/forwarding")
        forwards.write_text("1")
        second.setup()
        second.reclaim({"kept", "off"})
        assert forwards.read_text() == "0\n"
        refused(taken["kept"], lambda: hear(INTERNET, 443))
        assert asks(taken["kept"], "after.test") == 3
        expected = ["before.test", INTERNET, "after.test"]
        wait_until(
            lambda: sorted(one.host for one in records.decisions("kept")) == sorted(expected)
        )
        refused(taken["off"], lambda: hear(INTERNET, 80))
        assert sorted(one.port for one in records.decisions("off")) == [80, 443]
        second.release("kept")
        second.release("off")
        assert second.wait_until_idle(60)
        assert place(taken["kept"]) not in attended(second)
    finally:
        second.teardown()
        release_instance(paths)
    assert attended(second) == set()
