"""Setting up a slot's namespace in the agent's own process leaves the agent as it was."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hostruntime.network import netns
from hostruntime.network.stub_resolver import StubResolver
from tests.host.agent import eventually

pytestmark = pytest.mark.host


def test_the_resolvers_thread_is_in_no_slots_namespace() -> None:
    """It would keep the first one's alive for as long as the agent runs."""
    resolver, bound = StubResolver(), threading.Event()

    def add() -> None:
        os.unshare(os.CLONE_NEWNET)
        netns._bring_up_loopback()
        resolver.add(Path("/run/some-slot"), lambda _: None)
        bound.set()

    thread = threading.Thread(target=add)
    thread.start()
    thread.join()
    try:
        assert bound.is_set()
        assert resolver._thread is not None
        there = Path(f"/proc/self/task/{resolver._thread.native_id}/ns/net")
        for _ in eventually():
            if there.samefile("/proc/self/ns/net"):
                break
    finally:
        resolver.close()
