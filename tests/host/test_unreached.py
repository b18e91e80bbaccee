"""Allowed hosts that cannot be reached are named as such, in a world of namespaces."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable
from functools import partial

import pytest

from hostruntime.host.run import run
from hostruntime.network.egress import EgressProxy
from hostruntime.network.netns import run_in_namespace, run_ip
from hostruntime.network.policy import Policy
from hostruntime.network.slots import Slot, SlotPool
from tests.host.network import from_slot, wait_until
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import proxy as proxy
from tests.host.network import slot as slot
from tests.host.network import world as world
from tests.host.topology import INTERNET, World, through_proxy

pytestmark = pytest.mark.host

REFUSES, SILENT, PLAIN, NOBODYS = (f"203.0.113.{number}" for number in (20, 21, 22, 30))
RULES = f"""
table ip ways {{
  chain input {{
    type filter hook input priority 0;
    ip daddr {REFUSES} tcp dport 443 reject with tcp reset
    ip daddr {SILENT} tcp dport 443 drop
  }}
  chain prerouting {{
    type nat hook prerouting priority -100;
    ip daddr {PLAIN} tcp dport 443 redirect to :80
  }}
}}
"""
WHY = {
    "nowhere.test": "no_address",
    "refuses.test": "connection_refused",
    "away.test": "no_route",
    "plain.test": "no_tls",
    "silent.test": "timed_out",
}


@pytest.fixture(autouse=True, scope="module")
def ways(world: World) -> None:
    """Hosts that fail, each in its own way."""
    addresses = {"refuses": REFUSES, "silent": SILENT, "plain": PLAIN, "away": NOBODYS}
    world.names |= {f"{name}.test": [address] for name, address in addresses.items()}
    world.names["fine.test"] = [INTERNET]

    def make() -> None:
        run_ip([f"address add {one}/32 dev wan" for one in (REFUSES, SILENT, PLAIN)])
        run(["nft", "-f", "-"], input=RULES.encode(), timeout=10)

    run_in_namespace(world.internet, make)


def known_ways() -> dict[str, str]:
    """Squid 6 (Debian 13) has a tunnel answered without TLS carried like any other."""
    version = re.search(r"Version (\d+)", run(["squid", "-v"], timeout=10).text)
    assert version is not None
    return {name: why for name, why in WHY.items() if why != "no_tls" or int(version[1]) < 6}


def test_each_way_not_to_be_reached_has_its_name(
    proxy: EgressProxy, pool: SlotPool, slot: Callable[[Policy], Slot]
) -> None:
    mine = slot(Policy.parse("restricted", ["fine.test", *WHY]))
    entry = json.loads((pool.run_dir.entries / f"{mine.address}.json").read_bytes())
    owner = str(entry["owner"])
    ask = partial(through_proxy, pool.proxy_address(), timeout=40)
    assert from_slot(mine, partial(ask, "fine.test:443"))[0] == 200
    status, said = from_slot(mine, partial(ask, "nowhere.test:443"))
    assert status == 503
    assert b"Allowed by the network policy, but nowhere.test could not be reached" in said
    assert b"no address (DNS)" in said
    for name in list(WHY)[1:]:
        with pytest.raises(ssl.SSLError):
            from_slot(mine, partial(ask, f"{name}:443"))

    def found() -> dict[str, str]:
        decisions = proxy.decisions(owner)
        assert not [one for one in decisions if one.verdict == "refused"]
        return {one.host: one.reason for one in decisions if one.verdict == "unreached"}

    known = known_ways()
    wait_until(lambda: found() == known)
    uses = {use.host: use for use in proxy.hosts(owner)}
    assert {name for name, use in uses.items() if use.unreached} == set(known)
    assert uses["fine.test"].reason == "allowed"
    assert proxy.hosts(owner)[-1].host == "fine.test"
