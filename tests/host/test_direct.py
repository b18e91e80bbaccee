"""What goes past the proxy is recorded: the resolver that knows no name, in slots of a world."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from hostruntime.direct import MAX_LOG_BYTES
from hostruntime.egress import EgressProxy
from hostruntime.network import Slot, SlotPool
from hostruntime.paths import StatePaths, claim_instance, release_instance
from hostruntime.policy import Policy
from hostruntime.stub_resolver import ADDRESS, BURST, PER_SECOND, PORT
from tests.host.network import RESTRICTED, SETTINGS, from_slot, place, refused, wait_until
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import World, ask_resolver, dns_query

pytestmark = pytest.mark.host

OFF = Policy("off")
FLOOD = 20_000


@pytest.fixture(scope="module")
def records(pool: SlotPool, paths: StatePaths) -> EgressProxy:
    """Reads what is recorded; the proxy itself does not run."""
    return EgressProxy(paths, pool.instance, pool)


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
    assert pool.settle(30)
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
        assert asks(taken["kept"], "before.test") == 3
        first.close()
        assert first.resolver.attended() == set()
        refused(taken["kept"], partial(ask_resolver, ADDRESS, "meanwhile.test"))
        second.setup()
        second.reclaim({"kept"})
        assert asks(taken["kept"], "after.test") == 3
        wait_until(lambda: len(records.decisions("kept")) == 2)
        assert [one.host for one in records.decisions("kept")] == ["before.test", "after.test"]
        second.release("kept")
        assert second.settle(30)
        assert place(taken["kept"]) not in second.resolver.attended()
    finally:
        second.teardown()
        release_instance(paths)
    assert second.resolver.attended() == set()
