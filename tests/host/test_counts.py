"""After many commands and sandboxes the host holds just what it held after few."""

from __future__ import annotations

import pytest

from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import BASE
from tests.host.counts import grown, settled, work

pytestmark = pytest.mark.host

FEW, AT_ONCE, MANY = 18, 6, 42


def test_nothing_is_left_of_many_sandboxes_and_their_commands(
    agent: Agent, host: HostClient
) -> None:
    """Of ten times as many by themselves: ``python -m tests.benchmarks.leaks``."""
    work(host, BASE, FEW, AT_ONCE)
    before = settled(agent)
    assert before["agent's descriptors"] > 0
    work(host, BASE, MANY)
    assert grown(before, settled(agent)) == {}
