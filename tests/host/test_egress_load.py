"""The proxy under many connections, what it counts, and what a withdrawn policy ends."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from hostruntime.egress import EgressProxy
from hostruntime.network import Slot, SlotPool
from hostruntime.policy import Policy
from tests.host.network import RESTRICTED, from_slot, wait_until
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import proxy as proxy
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import GREETING, World, in_tls, through_proxy

pytestmark = pytest.mark.host


def test_traffic_is_counted_by_host(proxy: EgressProxy, pool: SlotPool) -> None:
    taken = pool.acquire("counted", RESTRICTED)
    try:
        for _ in range(3):
            from_slot(taken, lambda: through_proxy(pool.proxy_address(), "allowed.test:443"))
        wait_until(lambda: sum(t.tunnels for t in proxy.traffic("counted").values()) == 3)
    finally:
        pool.release("counted")
    carried = proxy.traffic("counted")["allowed.test"]
    assert carried.sent > 3 * 200
    assert carried.received > 3 * len(GREETING)


def test_a_policy_withdrawn_ends_what_is_open(
    pool: SlotPool, proxy: EgressProxy, world: World
) -> None:
    world.reached.clear()
    taken = pool.acquire("withdrawn", RESTRICTED)
    open_end = from_slot(taken, lambda: socket.create_connection(pool.proxy_address(), 5))
    with open_end:
        open_end.sendall(b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
        assert b" 200 " in open_end.recv(4000)
        pool.release("withdrawn")
        open_end.settimeout(1)
        with pytest.raises(OSError):
            in_tls(open_end, "allowed.test")
    assert world.reached == []


def test_a_thousand_connections_are_one_containers_problem(
    slot: Callable[[Policy], Slot], proxy: EgressProxy, pool: SlotPool
) -> None:
    greedy, other = slot(RESTRICTED), slot(RESTRICTED)
    where = pool.proxy_address()

    def open_many() -> tuple[list[socket.socket], list[bytes]]:
        ends, answers = [], []
        for _ in range(1000):
            ends.append(socket.create_connection(where, 10))
            ends[-1].sendall(b"CONNECT allowed.test:443 HTTP/1.1\r\n\r\n")
            answers.append(ends[-1].recv(4000))
        return ends, answers

    ends, answers = from_slot(greedy, open_many)
    try:
        accepted = sum(b" 200 " in answer.split(b"\r\n")[0] for answer in answers)
        assert accepted == 512
        assert sum(b"connections at once" in answer for answer in answers) == 1000 - accepted
        assert from_slot(other, lambda: through_proxy(where, "allowed.test:443"))[1] == GREETING
    finally:
        for end in ends:
            end.close()
    wait_until(
        lambda: from_slot(greedy, lambda: through_proxy(where, "allowed.test:443")[0]) == 200
    )
