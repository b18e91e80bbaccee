"""The network outlives its agent, is adopted by the next one, and mends itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.run import run
from hostruntime.network.egress import EgressProxy
from hostruntime.network.firewall_watch import count_table_parts
from hostruntime.network.policy import Policy
from hostruntime.network.slots import READY_SLOTS, Slot, SlotPool
from tests.host.network import (
    RESTRICTED,
    SETTINGS,
    assert_nothing_is_left,
    from_slot,
    place,
    refused,
    wait_until,
)
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import proxy as proxy
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import (
    GREETING,
    INTERNET,
    PRIVATE,
    World,
    hear,
    through_proxy,
)

pytestmark = pytest.mark.host


def test_a_new_agent_keeps_the_living_and_clears_the_rest(world: World, tmp_path: Path) -> None:
    paths = StatePaths(tmp_path / "state").ensure()
    first = SlotPool(paths, claim_instance(paths), SETTINGS)
    second = SlotPool(paths, first.instance, SETTINGS)
    try:
        first.setup()
        first.reclaim(set())
        policies = {"open": Policy("open"), "named": RESTRICTED, "dead": Policy("open")}
        taken = {owner: first.acquire(owner, policy) for owner, policy in policies.items()}
        first.close()
        second.setup()
        second.reclaim({"open", "named", "never-heard-of"})
        kept = {owner: second.slot_of(owner) for owner in ("open", "named", "dead")}
        assert kept == {**taken, "dead": None}
        assert not place(taken["dead"]).exists()
        assert from_slot(taken["open"], lambda: hear(INTERNET, 443)) == GREETING
        assert (second.run_dir.entries / f"{taken['named'].address}.json").exists()
        others = {second.acquire(f"next.{index}", Policy("off")).index for index in range(40)}
        assert not others & {taken["open"].index, taken["named"].index}
        second.reclaim(set())
        assert second.slot_of("open") is None
    finally:
        second.teardown()
        release_instance(paths)
    assert_nothing_is_left(second)


def without_table(pool: SlotPool) -> None:
    """Delete the table of the test's own instance, in the test's own network namespace."""
    run(["nft", "delete", "table", "inet", pool.instance.nft_table], timeout=10)


@pytest.mark.parametrize("mode", ["restricted", "open"])
def test_a_lost_firewall_is_back_before_a_slot_is_given(
    slot: Callable[[Policy], Slot], pool: SlotPool, mode: str
) -> None:
    without_table(pool)
    assert count_table_parts(pool.instance.nft_table) is None
    taken = slot(Policy.parse(mode))
    assert count_table_parts(pool.instance.nft_table)
    refused(taken, lambda: hear(PRIVATE[0], 80))


def test_without_a_firewall_nothing_networked_starts(
    slot: Callable[[Policy], Slot], pool: SlotPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_table(pool)
    broken = replace(pool.firewall.plan, prefix='not a name "')
    with monkeypatch.context() as patched:
        patched.setattr(pool.firewall, "plan", broken)
        for policy in (RESTRICTED, Policy("open"), RESTRICTED):
            with pytest.raises(HostUnavailable, match="firewall"):
                pool.acquire("unprotected", policy)
            assert pool.slot_of("unprotected") is None
        with pytest.raises(HostUnavailable, match="firewall"):
            pool.firewall.ensure_intact()
        slot(Policy("off"))
    taken = slot(Policy("open"))
    assert from_slot(taken, lambda: hear(INTERNET, 443)) == GREETING


@pytest.mark.parametrize(
    "harm",
    ["flush chain inet {} forward", "delete element inet {} denied4 {{ 192.168.0.0/16 }}"],
)
def test_a_firewall_that_was_tampered_with_is_mended(
    slot: Callable[[Policy], Slot], pool: SlotPool, proxy: EgressProxy, harm: str
) -> None:
    taken, named = slot(Policy("open")), slot(RESTRICTED)
    # Somebody's connections to the proxy are no change of it.
    from_slot(named, lambda: through_proxy(pool.proxy_address(), "allowed.test:443"))
    handle = table_handle(pool)
    pool.firewall.ensure_intact()
    assert table_handle(pool) == handle
    run(["nft", harm.format(pool.instance.nft_table)], timeout=10)
    pool.firewall.ensure_intact()
    assert table_handle(pool) != handle
    refused(taken, lambda: hear("192.168.9.5", 80))


def table_handle(pool: SlotPool) -> str:
    listing = run(["nft", "-a", "list", "table", "inet", pool.instance.nft_table], timeout=10).text
    return listing.splitlines()[0]


def test_looking_for_the_firewall_costs_a_start_next_to_nothing(pool: SlotPool) -> None:
    def cost() -> float:
        began = time.perf_counter()
        pool.firewall.ensure_present()
        return time.perf_counter() - began

    # The quickest: on a busy machine any one of them may be interrupted.
    assert min(cost() for _ in range(100)) < 0.002


def test_a_running_proxy_is_adopted_and_a_dead_one_replaced(
    slot: Callable[[Policy], Slot], pool: SlotPool, proxy: EgressProxy, paths: StatePaths
) -> None:
    taken, where = slot(RESTRICTED), pool.proxy_address()
    before = proxy.processes()
    again = EgressProxy(paths, pool.instance, pool)
    again.start()
    assert again.processes() == before
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: proxy.processes() == [])
    assert not proxy.healthy()
    refused(taken, lambda: through_proxy(where, "allowed.test:443"))
    proxy.ensure()
    assert proxy.healthy()
    assert from_slot(taken, lambda: through_proxy(where, "allowed.test:443")[0]) == 200


def test_a_proxy_whose_master_was_killed_is_replaced(proxy: EgressProxy) -> None:
    """What serves goes on without it for a while, and would never be started again."""
    master = int((proxy.run_dir.egress / "squid.pid").read_text())
    assert master in proxy.processes()
    os.kill(master, signal.SIGKILL)
    wait_until(lambda: master not in proxy.processes())
    proxy.ensure()
    successor = int((proxy.run_dir.egress / "squid.pid").read_text())
    assert successor != master
    assert successor in proxy.processes()
    assert proxy.healthy()


def test_a_dead_helper_means_refused_until_squid_has_started_another(
    slot: Callable[[Policy], Slot], pool: SlotPool, proxy: EgressProxy
) -> None:
    taken, where = slot(RESTRICTED), pool.proxy_address()
    helpers = proxy.helpers()
    assert helpers
    for pid in helpers:
        os.kill(pid, signal.SIGKILL)
    # Squid gives up and starts afresh when a helper dies young: cut off is refused, too.
    with suppress(OSError, IndexError):
        assert from_slot(taken, lambda: through_proxy(where, "elsewhere.test:443")[0]) == 403
    wait_until(proxy.healthy)
    assert from_slot(taken, lambda: through_proxy(where, "allowed.test:443")[0]) == 200


def test_helpers_that_hang_are_ended_with_their_proxy(proxy: EgressProxy) -> None:
    """They do not see that nobody asks them any more, and would be there for good."""
    hung = proxy.helpers()
    assert hung
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    proxy.ensure()
    assert proxy.healthy()
    wait_until(lambda: not set(hung) & set(proxy.helpers()))


def test_enough_slots_wait_ready(pool: SlotPool) -> None:
    assert pool.wait_until_idle(30)
    assert pool.ready() == dict(READY_SLOTS)
