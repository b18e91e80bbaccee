"""Setting up a slot's namespace in the agent's own process leaves the agent as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hostruntime.network import netns
from hostruntime.network.stub_resolver import StubResolver
from tests.host.agent import eventually

pytestmark = pytest.mark.host

# With no descriptor to spare, then with as many as it asks for.
FULL = """\
import os, resource
from hostruntime.network import libnftables
os.unshare(os.CLONE_NEWNET)
libnftables.load_rules("add table ip first")
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.dup(0))
except OSError:
    pass
try:
    libnftables.load_rules("add table ip second")
except OSError as error:
    print("refused:", error.strerror)
for each in held[-16:]:
    os.close(each)
libnftables.load_rules("add table ip third")
print("loaded")
"""


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


def test_rules_that_no_descriptor_is_left_for_do_not_end_the_agent() -> None:
    """The library calls exit(3) if it gets no socket."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", FULL], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "refused: Too many open files\nloaded\n")
