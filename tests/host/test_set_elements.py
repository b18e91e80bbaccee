"""What programs tried is read and removed over netlink: all of it, however much, and only that."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from hostruntime.network.firewall import ATTEMPTS_SET, drain_attempts
from hostruntime.network.set_elements import _MOST_AT_ONCE, delete_elements, list_elements

pytestmark = pytest.mark.host

TABLE = "ork_test"
MANY = 2 * _MOST_AT_ONCE + 100
KIND = "type ipv4_addr . inet_proto . ipv4_addr . inet_service; size 65536"


def elsewhere(action: Callable[[], None]) -> None:
    """Carry out an action in a network namespace of its own."""

    def act() -> None:
        os.unshare(os.CLONE_NEWNET)
        action()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(act).result()


def fill(family: str, ports: Sequence[int]) -> None:
    keys = ", ".join(f"192.0.2.1 . tcp . 198.51.100.1 . {port}" for port in ports)
    rules = (
        f"table {family} {TABLE} {{\nset {ATTEMPTS_SET} {{\n{KIND}; flags dynamic,timeout; "
        f"timeout 300s;\nelements = {{ {keys} }}\n}}\n}}\n"
    )
    done = subprocess.run(
        ["nft", "-f", "-"], input=rules.encode(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[:500]


def ports_left(family: str) -> set[int]:
    keys = [element.key for element in list_elements(family, TABLE, ATTEMPTS_SET)]
    return {struct.unpack("!H", key[12:14])[0] for key in keys}


@pytest.mark.parametrize("family", ["inet", "ip"])
def test_all_that_was_tried_is_returned_once(family: str) -> None:
    def drain() -> None:
        fill(family, range(1, MANY + 1))
        found = drain_attempts(TABLE, family)
        assert {one.port for one in found} == set(range(1, MANY + 1))
        assert {(one.source, one.protocol, one.address) for one in found} == {
            ("192.0.2.1", "tcp", "198.51.100.1")
        }
        assert drain_attempts(TABLE, family) == []

    elsewhere(drain)


def test_what_has_gone_meanwhile_keeps_back_only_those_beside_it() -> None:
    def delete() -> None:
        fill("inet", range(1, MANY + 1))
        keys = [element.key for element in list_elements("inet", TABLE, ATTEMPTS_SET)]
        delete_elements("inet", TABLE, ATTEMPTS_SET, keys[:1])
        fill("inet", [MANY + 1])
        with pytest.raises(FileNotFoundError):
            delete_elements("inet", TABLE, ATTEMPTS_SET, keys)
        # The others of the first part, and what came later.
        assert len(ports_left("inet")) == _MOST_AT_ONCE
        assert MANY + 1 in ports_left("inet")

    elsewhere(delete)


def test_one_that_was_listed_twice_keeps_none_back() -> None:
    """As the kernel may do while the set grows (rhashtable_walk_next)."""

    def delete() -> None:
        fill("inet", range(1, 11))
        keys = [element.key for element in list_elements("inet", TABLE, ATTEMPTS_SET)]
        delete_elements("inet", TABLE, ATTEMPTS_SET, [*keys, keys[0]])
        assert ports_left("inet") == set()

    elsewhere(delete)


def test_a_set_that_is_not_there_is_an_error() -> None:
    def drain() -> None:
        with pytest.raises(OSError, match="nftables"):
            list_elements("inet", TABLE, ATTEMPTS_SET)

    elsewhere(drain)
