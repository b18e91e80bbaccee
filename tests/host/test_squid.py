"""What Squid says of its configuration, and of itself when it does not come up."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from hostruntime.errors import HostUnavailable
from hostruntime.host.run import run
from hostruntime.network import egress
from hostruntime.network.egress import EgressProxy
from hostruntime.network.slots import SlotPool
from tests.host.network import paths as paths
from tests.host.network import pool as pool
from tests.host.network import proxy as proxy
from tests.host.network import world as world

pytestmark = pytest.mark.host


def test_squid_has_nothing_against_the_configuration(proxy: EgressProxy) -> None:
    written = str(proxy.run_dir.egress / "squid.conf")
    done = run(["/usr/sbin/squid", "-k", "parse", "-f", written], timeout=20)
    said = [line.partition("| ")[2] for line in done.stderr.decode().splitlines()]
    complaints = [line for line in said if line.startswith(("ERROR", "WARNING", "SECURITY"))]
    # A tunnel's other end sees none of the headers that this is about.
    assert complaints == ["WARNING: HTTP requires the use of Via"]


@pytest.fixture
def replaced(pool: SlotPool, proxy: EgressProxy) -> Iterator[EgressProxy]:
    """A proxy that is not running, in the place of the one that is; that one comes back."""
    proxy.stop()
    yield EgressProxy(proxy.paths, pool.instance, pool)
    proxy.start()


def test_a_proxy_that_does_not_come_up_says_its_last_words_first(
    replaced: EgressProxy, pool: SlotPool
) -> None:
    with (
        pytest.MonkeyPatch.context() as patched,
        socket.create_server(pool.proxy_address()),
        pytest.raises(HostUnavailable) as caught,
    ):
        patched.setattr(egress, "_START_SECONDS", 2.0)
        replaced.start()
    replaced.stop()
    # What was seen of it comes first; Squid 6 puts ERROR before its own.
    seen, _, said = caught.value.detail.partition("). ")
    assert seen.startswith("The egress proxy does not answer; it did nothing for 2 s")
    assert said.removeprefix("ERROR: ").startswith("commBind Cannot bind")


def test_a_proxy_that_cannot_start_says_why(replaced: EgressProxy) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(HostUnavailable) as caught:
        patched.setattr(egress, "squid_config", lambda _plan: "acl bungled bungle all\n")
        replaced.start()
    assert caught.value.detail.startswith("The egress proxy does not start. FATAL: Bungled")
    assert "line 1: acl bungled bungle all" in caught.value.detail
