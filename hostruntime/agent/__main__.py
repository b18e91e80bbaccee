"""``python -m hostruntime.agent``: serve, or tear everything down."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from hostruntime.agent.corking import CorkedProtocol
from hostruntime.agent.deleted_state import present
from hostruntime.agent.host import Host, tear_down
from hostruntime.agent.routes import application
from hostruntime.errors import HostError, HostUnavailable, InvalidRequest
from hostruntime.host import logs
from hostruntime.host.paths import StatePaths
from hostruntime.host.patience import scaled

_LOCK_SECONDS = 10.0
_PROGRESS_EVERY = 25
_REQUESTS_GRACE_SECONDS = 1
_SOCKET_MODE = 0o660
_OPEN_FILES = 65_536
# M_ARENA_MAX of mallopt(3), and how many heaps our threads share.
_M_ARENA_MAX, _ARENAS = -8, 2
_log = logging.getLogger("hostruntime.agent")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, handlers=[logs.handler()])
    # The access log adds nothing to the responses.
    logging.getLogger("uvicorn.access").disabled = True
    # LXC traverses directories as "others", and images keep the modes they are created with.
    os.umask(0o022)
    try:
        paths = StatePaths(options.state_dir.resolve())
        if options.action == "teardown":
            with present(paths) as is_needed:
                if is_needed:
                    with _exclusive_lock(paths):
                        tear_down(paths.ensure(), _print_progress)
            return 0
        path = options.socket or paths.root / "sock"
        with _exclusive_lock(paths.ensure()) as lock, _listen(path, options.socket_group) as sock:
            asyncio.run(_serve(paths, sock, lock), loop_factory=uvloop.new_event_loop)
    except (HostError, OSError) as error:
        print(f"hostruntime.agent: {error}", file=sys.stderr)  # noqa: T201 - the command's answer
        return 1
    return 0


def _print_progress(done: int, total: int) -> None:
    """Print the teardown's progress to standard output; the log goes elsewhere."""
    if done == total or done % _PROGRESS_EVERY == 0:
        print(f"ended {done} of {total} containers", flush=True)  # noqa: T201 - the command's answer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hostruntime.agent", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--socket", type=Path, help="where to serve (default: STATE_DIR/sock)")
    parser.add_argument("--socket-group", help="the group that may connect, by name")
    parser.add_argument("action", nargs="?", choices=["serve", "teardown"], default="serve")
    return parser


class _Server(uvicorn.Server):
    """A uvicorn server that also kills running commands when it is told to stop."""

    def __init__(self, config: uvicorn.Config, host: Host) -> None:
        super().__init__(config)
        self._host = host

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not super(): it would re-raise the signal after serving, and kill us before the cleanup.
        self.should_exit = True
        self._host.builds.prepare_shutdown()
        self._host.sandboxes.changes.close()
        self._host.containers.kill_commands()


async def _serve(paths: StatePaths, sock: socket.socket, lock: int) -> None:
    _raise_file_limit()
    share_heaps()
    host = await Host.open(paths, inherited_fds=[lock])
    try:
        config = uvicorn.Config(
            application(host),
            # Over httptools: a tenth of the work of the parser in Python.
            http=CorkedProtocol,
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_graceful_shutdown=_REQUESTS_GRACE_SECONDS,
            timeout_keep_alive=75,
        )
        _log.info("serving on %s", sock.getsockname())
        await _Server(config, host).serve(sockets=[sock])
    finally:
        # A second signal must not interrupt the cleanup.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        await host.close()


def _raise_file_limit() -> None:
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Each container takes some descriptors, here and in the launchers, which inherit the limit.
    # Without CAP_SYS_RESOURCE (capabilities(7)) it stays as it is.
    with suppress(ValueError, PermissionError):
        wanted = max(hard_limit, _OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def share_heaps() -> None:
    """Make threads share a few heaps; by default each gets its own, up to eight per core.

    A heap keeps its peak size, so memory would rise for hours until every thread has done every
    kind of work.  Because of the GIL, threads hardly ever wait for a shared heap.
    """
    libc = ctypes.CDLL(None)
    # musl has a single heap, and no mallopt.
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, _ARENAS)


@contextmanager
def _listen(path: Path, group: str | None) -> Iterator[socket.socket]:
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
def _exclusive_lock(paths: StatePaths) -> Iterator[int]:
    """Hold the pid file's lock; launchers inherit it, so that none outlives its agent unnoticed.

    Raises HostUnavailable if another agent holds it.
    """
    descriptor = os.open(paths.pid_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # A fixed time: the other agent may be there to stay.
        deadline = time.monotonic() + scaled(_LOCK_SECONDS)
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
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
