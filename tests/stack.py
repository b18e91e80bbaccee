"""A whole installation for tests to drive: real PostgreSQL, agent, proxy, worker and web.

It is started the way a person starts it, by `manage.py up`, on a free port and with a var
directory of its own, once a test session, and is gone when the session ends however it ends. A
conftest takes part by importing the fixture::

    from tests.stack import stack as stack

``ORKESTR_TEST_VAR`` names a var directory to keep between sessions (its base images take minutes
to make); without it everything is made anew in a temporary one.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from orkestr_console.runner.keeper import Keeper, tail
from orkestr_console.runner.layout import Layout, layout_from
from orkestr_console.runner.summary import Credentials, known_credentials
from tests.bases import save_bases
from tests.host.client import HostClient

# Less than a test's time, so that what the installation said is what the failure shows.
READY_SECONDS = 840
# Long, for a machine that is slow and shared; what hangs takes longer.
STOP_SECONDS = 300
MANAGE_SECONDS = 600


class Stack:
    """One running installation. Its attributes are what a client has to know of it."""

    def __init__(self, var: Path, *, keep: bool = False) -> None:
        self._keep = keep
        self._process: subprocess.Popen[bytes] | None = None
        ports = {"PORT": str(free_port()), "ORKESTR_PREVIEW_PORT": str(free_port())}
        self.layout: Layout = layout_from({"ORKESTR_VAR": str(var), **ports})
        self.output = var / "up.log"

    @property
    def url(self) -> str:
        """Where the console and the API answer."""
        return f"http://127.0.0.1:{self.layout.port}"

    @property
    def credentials(self) -> Credentials:
        """The demo team's login and API key."""
        found = known_credentials(self.layout)
        assert found is not None, f"no {self.layout.console_json}"
        return found

    @property
    def api_key(self) -> str:
        """An API key of the demo team with every scope."""
        return self.credentials.api_key

    def client(self) -> httpx.Client:
        """A plain HTTP client of the REST API, signed in with the demo team's key."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def host(self) -> HostClient:
        """The agent's own socket, to see what really is on the host."""
        return HostClient(self.layout.host_socket)

    def start(self) -> None:
        """Start it and wait until it is ready; AssertionError with its output if it is not."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--no-self-check"],
                cwd=self.layout.tree,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_for(self._is_ready, READY_SECONDS, self.explain)

    def environment(self) -> dict[str, str]:
        """The environment in which management commands speak of this installation."""
        # Receivers of webhooks are on this machine, as everything else of a test.
        permitted = {"ORKESTR_WEBHOOK_PERMIT": "127.0.0.0/8"}
        return {**os.environ, **self.layout.environment(), **permitted, "DATABASE_URL": ""}

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"`up` ended:\n{self.explain()}"
        return self.layout.ready.exists()

    def explain(self) -> str:
        """What it said lately and where it is now, for a failure's message."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        logs = [self.output, *sorted(self.layout.log.glob("*.log"))]
        return "\n".join(f"{log.name}:\n{tail(log)}" for log in logs)

    def manage(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a management command of this installation, which must end in ten minutes."""
        return subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=self.layout.tree,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=MANAGE_SECONDS,
        )

    def pid(self, program: str) -> int:
        """The process id of `web`, `worker`, `agent` or `postgres`."""
        return Keeper(self.layout, ()).states()[program][1]

    @property
    def up_pid(self) -> int:
        """The process id of `manage.py up` itself."""
        assert self._process is not None
        return self._process.pid

    def kill(self, program: str) -> None:
        """`kill -9` one program's main process."""
        os.kill(self.pid(program), signal.SIGKILL)

    def wait_until_restarted(self, program: str, old: int, seconds: float = 30) -> None:
        """Wait for the process manager to have started ``program`` again."""
        wait_for(lambda: self.pid(program) not in {0, old}, seconds, self.explain)

    def stop(self) -> None:
        """What Ctrl-C does: the programs end, sandboxes and data stay."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def down(self) -> None:
        """What `make down` does: sandboxes end as well, data stays."""
        done = self.manage("down")
        assert done.returncode == 0, done.stdout + done.stderr
        assert self._process is not None
        self._process.wait(STOP_SECONDS)
        self._process = None

    def close(self) -> None:
        """End it, sandboxes too, and remove its var directory unless it was asked to be kept."""
        try:
            self.stop()
        finally:
            command = ["down"] if self._keep else ["down", "--remove"]
            done = self.manage(*command)
            assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    """A TCP port nobody uses now, and that no other run of the suite is given before this one ends.

    Below the range that outgoing connections take theirs from (``ip_local_port_range``, ip(7)):
    one of those may have it again while the console restarts.
    """
    for _ in range(100):
        port = random.randrange(18000, 32000)
        if _reserve(port) and port_is_free(port):
            return port
    raise AssertionError("no free port in a hundred tries")


def port_is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of every IPv4 address now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


_reserved: list[socket.socket] = []


def _reserve(port: int) -> bool:
    """Hold an abstract Unix socket of the port's name (unix(7)) for the rest of this process."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0orkestr-test-port-{port}")
    except OSError:
        claim.close()
        return False
    _reserved.append(claim)
    return True


def wait_for(
    condition: Callable[[], bool], seconds: float, explain: Callable[[], str] = str
) -> None:
    """Poll until ``condition()``; AssertionError with ``explain()`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{explain()}"
        time.sleep(0.05)


@contextmanager
def running_stack() -> Iterator[Stack]:
    """A started stack for the length of a block."""
    kept = os.environ.get("ORKESTR_TEST_VAR")
    scratch = os.environ.get("ORKESTR_TEST_DIRECTORY", "/var/tmp")
    var = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="orkestr-stack-", dir=scratch))
    stack = Stack(var, keep=bool(kept))
    try:
        stack.start()
        save_bases(stack.layout.state_dir)
        yield stack
    finally:
        stack.close()


SHARED = pytest.StashKey[Stack]()


@pytest.fixture(scope="session")
def stack(request: pytest.FixtureRequest) -> Stack:
    """The session's one live installation, shared by every directory that imports this."""
    config = request.config
    if SHARED not in config.stash:
        cleanup = ExitStack()
        config.add_cleanup(cleanup.close)
        config.stash[SHARED] = cleanup.enter_context(running_stack())
    return config.stash[SHARED]
