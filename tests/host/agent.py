"""A real host agent for tests: started, killed, restarted and taken down like an operator would."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostruntime.container.cgroups import SLICE, cgroup_layout
from hostruntime.errors import HostUnavailable
from tests.host.client import HostClient
from tests.processes import command_lines, launcher_pids

REPO = Path(__file__).resolve().parents[2]
STATE = REPO / "var" / "test-host"
CGROUPS = Path("/sys/fs/cgroup")


class Agent:
    """One agent process on one state directory."""

    def __init__(self, state: Path, *, umask: int = -1) -> None:
        self.state = state
        self._umask = umask
        self.socket = state / "sock"
        self.log_path = state / "agent.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = HostClient(self.socket)
        # More variables for it, from its next start on.  Tests count what there is.
        self.environment = {"ORKESTR_WARM_CONTAINERS": "0"}
        self.command = [sys.executable, "-m", "hostruntime.agent"]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def prefix(self) -> str:
        return f"ork{self.client.health().instance}-"

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=REPO,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                umask=self._umask,
            )
        self._wait_until_it_serves()

    def stop(self) -> None:
        """SIGTERM, at which it must end well within what a process manager waits (10 s)."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def children(self) -> list[int]:
        """The agent's child processes that last: its launchers."""
        return launcher_pids(self.pid)

    def tear_down(self) -> str:
        """Take everything down; what the command told of it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(120)
        command = [*self._command(), "teardown"]
        done = subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, timeout=600)
        return done.stdout.decode()

    def log(self) -> str:
        return self.log_path.read_text()

    def second(self) -> subprocess.CompletedProcess[str]:
        """Try to run another agent on the same directory."""
        return subprocess.run(
            self._command(), cwd=REPO, capture_output=True, text=True, timeout=180
        )

    def _command(self) -> list[str]:
        options = ["--state-dir", str(self.state), "--socket", str(self.socket)]
        return [*self.command, *options]

    def _wait_until_it_serves(self) -> None:
        until = time.monotonic() + 180
        while True:
            try:
                self.client.health()
            except HostUnavailable:
                assert self.process is not None
                assert self.process.poll() is None, self.log()[-3000:]
                assert time.monotonic() < until, self.log()[-3000:]
                time.sleep(0.05)
            else:
                return


@contextmanager
def an_agent(state: Path = STATE) -> Iterator[Agent]:
    """Run an agent; afterwards nothing of it is on the host but the images in its directory."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (state / "tests.lock").open("w") as lock:
        # The base images are worth sharing between runs, so runs take turns.
        fcntl.flock(lock, fcntl.LOCK_EX)
        agent = Agent(state)
        agent.tear_down()
        # Each run has a database of its own, which the state of the run before is not of.
        (state / "installation.json").unlink(missing_ok=True)
        try:
            agent.start()
            yield agent
        finally:
            agent.tear_down()


def instance_groups(instance: str) -> list[Path]:
    """What is above the groups of an instance (``ork0``) in each hierarchy it may be in."""
    names = (instance, f"*/{instance}", f"{SLICE}/{instance}.service")
    return [path for name in names for path in CGROUPS.glob(name)]


def groups_named(prefix: str) -> list[str]:
    """Every cgroup of a container whose name starts so, in any hierarchy."""
    instance = prefix.partition("-")[0]
    roots = instance_groups(instance)
    return [str(path) for root in roots for path in root.glob(f"*{prefix}*")]


def container_of(state: Path, sandbox_id: str) -> str:
    """The name of a sandbox's container, which may have been started before the sandbox."""
    record = state / "sandboxes" / sandbox_id / "sandbox.json"
    return str(json.loads(record.read_text())["container"])


def init_of(agent: Agent, sandbox_id: str) -> int:
    """The host's pid of a sandbox's init."""
    group = cgroup_layout().container(container_of(agent.state, sandbox_id)).unified
    return int((group / "cgroup.procs").read_text().split()[0])


def mounts_below(path: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{path}/")]


def children_named(prefix: str) -> list[str]:
    """LXC monitors and inits of containers with this prefix that are running."""
    return [
        f"{pid}: {line}"
        for pid, line in command_lines().items()
        if "[lxc monitor]" in line and f" {prefix}" in line
    ]


def eventually(seconds: float = 120.0) -> Iterator[None]:
    """Loop body runs until it breaks, or fails after a while: ``for _ in eventually(): …``."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(0.02)
    raise AssertionError(f"it did not come true within {seconds} s")


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return not stat.rpartition(")")[2].startswith(" Z")
