"""``python -m hostruntime.agent``: serve, or take everything down."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import fcntl
import grp
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from hostruntime.agent.host import Host, tear_down
from hostruntime.agent.routes import application
from hostruntime.errors import HostError, HostUnavailable, InvalidRequest
from hostruntime.host import logs
from hostruntime.host.paths import StatePaths
from hostruntime.host.patience import scaled

_LOCK_SECONDS = 10.0
_TOLD_EVERY = 25
_REQUESTS_GRACE_SECONDS = 1
_SOCKET_MODE = 0o660
# M_ARENA_MAX of mallopt(3), and how many heaps our threads share.
_M_ARENA_MAX, _ARENAS = -8, 2
_log = logging.getLogger("hostruntime.agent")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, handlers=[logs.handler()])
    # One line a request says nothing that the answer did not.
    logging.getLogger("uvicorn.access").disabled = True
    # LXC goes through directories as others, and images keep the modes they are made with.
    os.umask(0o022)
    try:
        paths = StatePaths(options.state_dir.resolve())
        if options.action == "teardown":
            if paths.root.is_dir():
                with _only_agent(paths):
                    tear_down(paths.ensure(), _tell)
            return 0
        path = options.socket or paths.root / "sock"
        with _only_agent(paths.ensure()) as lock, _listening(path, options.socket_group) as sock:
            asyncio.run(_serve(paths, sock, lock))
    except (HostError, OSError) as error:
        print(f"hostruntime.agent: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1
    return 0


def _tell(done: int, of: int) -> None:
    """Say on standard output how far the teardown is; the log goes elsewhere."""
    if done == of or done % _TOLD_EVERY == 0:
        print(f"ended {done} of {of} containers", flush=True)  # noqa: T201 - the command's answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hostruntime.agent", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--socket", type=Path, help="where to serve (default: STATE_DIR/sock)")
    parser.add_argument("--socket-group", help="the group that may connect, by name")
    parser.add_argument("action", nargs="?", choices=["serve", "teardown"], default="serve")
    return parser


class _Server(uvicorn.Server):
    """Uvicorn; told to stop, it also ends the commands that requests are waiting for."""

    def __init__(self, config: uvicorn.Config, host: Host) -> None:
        super().__init__(config)
        self._host = host

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not super(): it would raise the signal again once served, and end us before the rest.
        self.should_exit = True
        self._host.builds.prepare_shutdown()
        self._host.sandboxes.changes.close()
        self._host.containers.kill_execs()


async def _serve(paths: StatePaths, sock: socket.socket, lock: int) -> None:
    _raise_file_limit()
    share_heaps()
    host = await Host.open(paths, keep=[lock])
    try:
        config = uvicorn.Config(
            application(host),
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_REQUESTS_GRACE_SECONDS,
            timeout_keep_alive=75,
        )
        _log.info("serving on %s", sock.getsockname())
        await _Server(config, host).serve(sockets=[sock])
    finally:
        # A second signal must not interrupt the end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        await host.close()


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def share_heaps() -> None:
    """Let our threads share a few heaps: by default each new one gets its own, eight a core.

    Each keeps what its busiest moment took, so that memory rises for hours until every thread has
    had every kind of work.  They take turns in Python anyway, and hardly ever wait for a heap.
    """
    libc = ctypes.CDLL(None)
    # musl has one heap, and no mallopt.
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, _ARENAS)


@contextmanager
def _listening(path: Path, group: str | None) -> Iterator[socket.socket]:
    """A Unix socket that root and ``group`` may connect to.  Raises InvalidRequest, OSError."""
    gid = _group_id(group) if group else 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        mask = os.umask(0o777)
        try:
            sock.bind(str(path))
        finally:
            os.umask(mask)
        os.chown(path, 0, gid)
        path.chmod(_SOCKET_MODE)
        sock.listen(1024)
        try:
            yield sock
        finally:
            path.unlink(missing_ok=True)


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidRequest(f"There is no group {name!r}; create it or name another.") from None


@contextmanager
def _only_agent(paths: StatePaths) -> Iterator[int]:
    """Hold the pid file's lock; launchers hold it too, so that none outlives its agent unseen.

    Raises HostUnavailable when another agent has it.
    """
    descriptor = os.open(paths.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # Not for as long as the other works: it may be there to stay.
        until = time.monotonic() + scaled(_LOCK_SECONDS)
        while not _try_lock(descriptor):
            if time.monotonic() > until:
                pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise HostUnavailable(
                    f"Another host agent (pid {pid}) runs on {paths.root}. Stop it first."
                )
            time.sleep(0.05)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
