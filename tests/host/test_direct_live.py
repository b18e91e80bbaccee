"""Programs that ignore the proxy, in real sandboxes and builds: told at once, and recorded.

Nobody but the container's own resolver is asked for these names: no packet leaves for them.
"""

from __future__ import annotations

import pytest

from hostruntime.wire.builds import BuildEvent
from hostruntime.wire.commands import Exec
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.host.test_build_events import Build
from tests.host.test_build_events import build as build

pytestmark = pytest.mark.host

ASK = "getent hosts {}; echo $?"
# glibc waits five seconds for a resolver that does not answer, and asks twice (resolv.conf(5)).
AT_ONCE_MS = 2_000


@pytest.mark.parametrize(
    ("network", "name", "verdict", "reason"),
    [
        ("restricted", "nowhere.invalid", "refused", "not_listed"),
        ("restricted", "listed.invalid", "unreached", "past_proxy"),
        ("off", "nowhere.invalid", "refused", "network_off"),
    ],
)
def test_a_sandbox_is_told_at_once_and_heard_of(
    host: HostClient, new_sandbox: NewSandbox, network: str, name: str, verdict: str, reason: str
) -> None:
    listed = ["listed.invalid"] if network == "restricted" else None
    box, near = (new_sandbox(network=network, allow_domains=listed) for _ in range(2))
    done = host.exec(box.id, Exec(ASK.format(name)))
    assert done.stdout == b"2\n"
    assert done.duration_ms < AT_ONCE_MS
    (use,) = host.egress_hosts(box.id)
    assert (use.host, use.direct, use.port, use.reason) == (name, True, 0, reason)
    verdicts = {"refused": use.refused, "unreached": use.unreached, "allowed": use.allowed}
    assert {found: count for found, count in verdicts.items() if count} == {verdict: 1}
    assert host.egress_hosts(near.id) == []


# Documentation's own (RFC 5737): nobody is there, and nothing gets out.
TRY = "bash -c 'exec 3<>/dev/tcp/192.0.2.1/443'; echo $?"


def test_an_address_that_is_tried_with_network_off_is_heard_of(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    box, near = (new_sandbox(network="off") for _ in range(2))
    done = host.exec(box.id, Exec(TRY))
    assert done.stdout == b"1\n"
    assert done.duration_ms < AT_ONCE_MS
    (use,) = host.egress_hosts(box.id)
    assert (use.host, use.port, use.direct, use.refused) == ("192.0.2.1", 443, True, 1)
    assert use.reason == "network_off"
    assert host.egress_hosts(near.id) == []


def test_a_build_without_network_names_the_address_it_tried(build: Build) -> None:
    said = failed(build("true", "echo > /dev/tcp/192.0.2.1/443", network="off"))
    assert (said["code"], said["step"]) == ("network_policy_blocked", 2)
    assert "the network policy refused: 192.0.2.1:443. " in str(said["message"])
    assert 'has network "off"' in str(said["message"])


def test_sandboxes_outlive_the_agent_and_are_heard_of_again(
    host: HostClient, new_sandbox: NewSandbox, agent: Agent
) -> None:
    boxes = [new_sandbox(network=network) for network in ("restricted", "off")]
    agent.kill()
    agent.start()
    for box in boxes:
        assert host.exec(box.id, Exec(ASK.format("again.invalid"))).stdout == b"2\n"
        assert host.requested_hosts(box.id, direct=True) == {"again.invalid": 1}
    # One that was made ready by the new agent, and one that it has to make.
    for box in [new_sandbox(network="off") for _ in range(10)]:
        assert host.exec(box.id, Exec(ASK.format("new.invalid"))).stdout == b"2\n"
        assert host.requested_hosts(box.id, direct=True) == {"new.invalid": 1}


def test_a_flood_takes_nobody_elses_time(host: HostClient, new_sandbox: NewSandbox) -> None:
    noisy, quiet = (new_sandbox(network="restricted") for _ in range(2))
    question = r"\0\7\1\0\0\1\0\0\0\0\0\0\5flood\7invalid\0\0\1\0\1"
    flood = (
        f"exec 3>/dev/udp/127.0.0.53/53; for i in {{1..20000}}; do printf '{question}' >&3; done"
    )
    host.exec(noisy.id, Exec(flood))
    done = host.exec(quiet.id, Exec(ASK.format("calm.invalid")))
    assert done.stdout == b"2\n"
    assert done.duration_ms < AT_ONCE_MS
    assert host.requested_hosts(quiet.id, direct=True) == {"calm.invalid": 1}
    recorded = host.requested_hosts(noisy.id, direct=True)
    assert recorded.keys() == {"flood.invalid"}
    assert recorded.total() < 5_000


def failed(events: list[BuildEvent]) -> dict[str, object]:
    assert events[-1].kind == "failed"
    return events[-1].data


def test_a_build_names_the_step_and_what_its_program_needs(build: Build) -> None:
    events = build("getent hosts first.invalid || true", "getent hosts nowhere.invalid")
    said = failed(events)
    assert (said["code"], said["step"]) == ("network_policy_blocked", 2)
    assert said["refused"] == ["nowhere.invalid"]
    assert "the network policy refused: nowhere.invalid (by DNS)." in str(said["message"])
    for part in ("$HTTPS_PROXY", '"allow_domains"', 'network "open"'):
        assert part in str(said["message"])
    first = next(event.data for event in events if event.kind == "step_finished")
    assert [(one["host"], one["direct"]) for one in first["refused"]] == [("first.invalid", True)]


def test_an_allowed_name_is_no_refusal(build: Build) -> None:
    said = failed(build("getent hosts nowhere.invalid", allow_domains=["nowhere.invalid"]))
    assert (said["code"], "refused" in said) == ("step_failed", False)
    assert "nowhere.invalid is allowed, but through the proxy alone" in str(said["message"])
    assert "$HTTPS_PROXY" in str(said["message"])


def test_a_build_without_network_says_so(build: Build) -> None:
    said = failed(build("getent hosts nowhere.invalid", network="off"))
    assert (said["code"], "refused" in said) == ("network_policy_blocked", False)
    assert 'has network "off"' in str(said["message"])
