"""`manage.py down`: end the sandboxes, stop the console, and release all host resources."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hostruntime.client.host_client import HostClient
from hostruntime.errors import HostError
from hostruntime.host.patience import Patience, process_tree
from hostruntime.host.run import CommandFailed, run
from orkestr_console.runner.confine import mount_points
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import lock_holder

# How long stopping programs may be idle; the time they work doesn't count.
STOP_SECONDS = 90
TEARDOWN_SECONDS = 120


class DownError(Exception):
    """Something could not be stopped or removed; the message says what to do."""


def bring_down(layout: Layout, report: Callable[[str], None]) -> None:
    """End every sandbox, stop a running console, release namespaces, mounts and firewall rules.

    Safe to repeat. Raises ``DownError``.
    """
    running = count_sandboxes(layout)
    # First, so that nobody creates another, or takes those ended here for lost.
    if stop_console(layout):
        report("console stopped")
    if layout.state_dir.exists():
        tear_down_host(layout, report)
        if running:
            report(f"{running} {'sandbox' if running == 1 else 'sandboxes'} ended")
        report("containers, mounts and networks released")
    if layout.run.is_dir():
        layout.sandboxes_ended_marker.touch()


def count_sandboxes(layout: Layout) -> int:
    """How many sandboxes run; 0 if the agent doesn't answer."""
    if not layout.host_socket.exists():
        return 0
    try:
        with HostClient(layout.host_socket) as host:
            return sum(found.state == "running" for found in host.sandboxes())
    except HostError:
        return 0


def stop_console(layout: Layout) -> bool:
    """Stop this installation's `up`; whether one was running."""
    process = lock_holder(layout)
    if process is None:
        return False
    os.kill(process, signal.SIGTERM)
    patience = Patience(STOP_SECONDS, lambda: process_tree(process))
    while lock_holder(layout) is not None:
        if patience.exhausted():
            raise DownError(
                f"process {process} does not stop: it {patience.reason}. See {layout.log}; "
                f"`kill -9 {process}` ends it and everything it runs"
            )
        time.sleep(0.1)
    return True


def tear_down_host(layout: Layout, report: Callable[[str], None]) -> None:
    """Have the host runtime remove all of this state directory's resources from the host.

    Raises ``DownError``.
    """

    def on_line(line: str) -> None:
        if line.startswith("ended "):
            report(line)

    command = [sys.executable, "-m", "hostruntime.agent", "--state-dir", str(layout.state_dir)]
    try:
        run(
            [*command, "--socket", str(layout.host_socket), "teardown"],
            cwd=layout.tree,
            env=os.environ,
            timeout=TEARDOWN_SECONDS,
            on_line=on_line,
        )
    except CommandFailed as error:
        raise DownError(f"the host could not be cleaned: {error}") from error


def remove_state(layout: Layout) -> None:
    """Delete var/ and the state directory, but never through a mount. Raises ``DownError``."""
    paths_to_remove = [path for path in (layout.state_dir, layout.var) if path.exists()]
    mounted = [
        mount
        for mount in mount_points(Path("/proc/self/mountinfo").read_text())
        if any(mount.is_relative_to(path) for path in paths_to_remove)
    ]
    if mounted:
        paths = " ".join(map(str, mounted))
        raise DownError(f"still mounted, so nothing was removed; unmount it first: {paths}")
    for path in paths_to_remove:
        shutil.rmtree(path, ignore_errors=False)
