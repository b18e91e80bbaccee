"""What a reboot ended is said to have ended as soon as the console is back."""

from __future__ import annotations

import subprocess
import sys

from hostruntime.host.patience import scaled
from orkestr_console.runner.layout import TREE
from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for

SETTLED_SECONDS = 10.0


def test_sandboxes_that_a_reboot_ended_are_settled_at_once(
    stack: Stack, sandboxes: Sandboxes
) -> None:
    """Containers gone, rows as they were, and nobody has told the database (as `make down` does).

    The schedule comes round half a minute after a start.
    """
    ended = sandboxes.boot("debian-12")
    stack.stop()
    layout = stack.layout
    agent = [sys.executable, "-m", "hostruntime.agent", "--state-dir", str(layout.state_dir)]
    subprocess.run([*agent, "teardown"], cwd=TREE, check=True, stdout=subprocess.DEVNULL)
    assert not layout.sandboxes_ended_marker.exists()
    stack.start()

    def status() -> str:
        with stack.client() as client:
            return str(client.get(f"/v1/sandboxes/{ended.id}").json()["status"])

    wait_for(lambda: status() == "failed", scaled(SETTLED_SECONDS), stack.explain)
