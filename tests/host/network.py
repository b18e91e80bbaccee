"""A pool of slots and its proxy in a world of namespaces, for the tests of the network."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.host.run import run
from hostruntime.network import registries
from hostruntime.network.egress import EgressProxy
from hostruntime.network.netns import interfaces_with_prefix, run_in_namespace
from hostruntime.network.policy import Policy, deny_list
from hostruntime.network.settings import NetworkSettings
from hostruntime.network.slots import Slot, SlotPool
from tests.host.agent import mounts_below
from tests.host.topology import (
    INTERNET,
    METADATA,
    PRIVATE,
    RESOLVER,
    World,
    a_world,
    ask_resolver,
)

SETTINGS = NetworkSettings(denied=deny_list(), permitted=(), resolvers=(RESOLVER,))
LISTED = ("allowed.test", "private.test", "mixed.test", "local.test", "metadata.test", "gone.test")
RESTRICTED = Policy("restricted", LISTED)
NUMBERS = itertools.count()
# Few, as some tests take them all.
SLOTS = 64
HOST_SECOND = "203.0.113.2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with a_world(tmp_path_factory.mktemp("world")) as world:
        world.names |= {
            "allowed.test": [INTERNET],
            "www.allowed.test": [INTERNET],
            "evil-allowed.test": [INTERNET],
            "elsewhere.test": [INTERNET],
            "private.test": [PRIVATE[0]],
            "mixed.test": [INTERNET, PRIVATE[0]],
            "metadata.test": [METADATA],
            "local.test": [HOST_SECOND],
        }
        yield world


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> StatePaths:
    return StatePaths(tmp_path_factory.mktemp("state")).ensure()


@pytest.fixture(scope="module")
def pool(world: World, paths: StatePaths) -> Iterator[SlotPool]:
    pool = SlotPool(paths, claim_instance(paths), SETTINGS, SLOTS)
    try:
        pool.setup()
        pool.reclaim(set())
        yield pool
    finally:
        pool.teardown()
        release_instance(paths)
    assert_nothing_is_left(pool)


@pytest.fixture(scope="module")
def proxy(pool: SlotPool, paths: StatePaths) -> Iterator[EgressProxy]:
    proxy = EgressProxy(paths, pool.instance, pool)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.stop()
        registries.clear_cache()
    assert proxy.processes() == []


@pytest.fixture
def slot(pool: SlotPool, request: pytest.FixtureRequest) -> Iterator[Callable[[Policy], Slot]]:
    """Acquire slots that are released when the test ends; owners are named after the test."""
    owners: list[str] = []

    def acquire(policy: Policy) -> Slot:
        owners.append(f"{request.node.name.partition('[')[0]}.{next(NUMBERS)}")
        return pool.acquire(owners[-1], policy)

    yield acquire
    for owner in owners:
        pool.release(owner)


def assert_nothing_is_left(pool: SlotPool) -> None:
    assert interfaces_with_prefix(pool.instance.prefix) == []
    assert not pool.run_dir.root.exists()
    assert mounts_below(pool.run_dir.root) == []
    # Word for word: instance 1 is not gone only because 12 is there.
    tables = run(["nft", "list", "tables"], timeout=10).text.splitlines()
    assert f"table inet {pool.instance.nft_table}" not in tables
    addresses = run(["ip", "-o", "address"], timeout=10).text.split()
    assert not [one for one in addresses if one.partition("/")[0] == pool.proxy_address()[0]]


def place(slot: Slot) -> Path:
    assert slot.netns is not None
    return slot.netns


def from_slot[R](slot: Slot, action: Callable[[], R]) -> R:
    return run_in_namespace(place(slot), action)


def refused(slot: Slot, action: Callable[[], object]) -> OSError:
    """Expect an action in a slot to fail at the network; return how."""
    with pytest.raises(OSError) as caught:
        from_slot(slot, action)
    return caught.value


@contextmanager
def listening(slot: Slot) -> Iterator[str]:
    """Serve port 443 on a slot's address, proven from within, while the block runs."""
    address = str(slot.address)
    with from_slot(slot, partial(socket.create_server, ("0.0.0.0", 443))):
        from_slot(slot, lambda: socket.create_connection((address, 443), 2).close())
        yield address


def send_datagram(address: str, port: int) -> bytes:
    return ask_resolver(address, "allowed.test") if port == 53 else _datagram(address, port)


def _datagram(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        handle.settimeout(0.5)
        handle.connect((address, port))
        handle.send(b"?")
        return handle.recv(100)


def wait_until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
