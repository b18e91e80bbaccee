"""The network outlives its agent, is adopted by the next one, and mends itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hostruntime.egress import EgressProxy
from hostruntime.network import READY, Slot, SlotPool
from hostruntime.paths import StatePaths, claim_instance, release_instance
from hostruntime.policy import Policy
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


def test_enough_slots_wait_ready(pool: SlotPool) -> None:
    assert pool.settle(30)
    assert pool.ready() == dict(READY)
