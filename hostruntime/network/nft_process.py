"""The agent's side of the process that has nft's library (:mod:`hostruntime.network.libnftables`).

It is started when it is first needed, and anew if it has died or hangs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostruntime.errors import HostFault, HostUnavailable
from hostruntime.host import channel
from hostruntime.host.patience import Patience, scaled
from hostruntime.host.run import Process, spawn, wait_or_kill

_MODULE = "hostruntime.network.libnftables"
_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_TIMEOUT = 20.0
_CLOSE_SECONDS = 1.0
# How often a request is made; a process may have died long before it, or of it.
_ATTEMPTS = 2
_log = logging.getLogger(__name__)


class NftProcess:
    """One process, which carries out the requests of all threads in turn.

    What it says besides its answers is appended to ``log``.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._started: tuple[Process, socket.socket] | None = None

    def run(self, commands: str, *, as_json: bool = False) -> str:
        """Carry out commands like `nft -f`, all or none, in the calling thread's namespace.

        They must do no harm twice: if the process dies meanwhile, another repeats them.  Returns
        what they print, like `nft -j` with ``as_json``.  Raises HostFault with what nft says,
        HostUnavailable if it is not installed or keeps dying, OSError.
        """
        request = {"commands": commands, "json": as_json}
        with _descriptor("/proc/thread-self/ns/net") as namespace, self._lock:
            for _ in range(_ATTEMPTS):
                answer = self._ask(request, namespace)
                if answer is not None:
                    return _output(answer)
        raise HostUnavailable("What loads network rules keeps dying; look into the agent's log.")

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._end()

    def _ask(self, request: Mapping[str, Any], namespace: int) -> dict[str, Any] | None:
        """The answer to a request; None if the process has died.  Raises HostFault, OSError."""
        process, sock = self._started or self._start()
        try:
            channel.send(sock, request, [namespace])
            self._wait(process, sock)
            answer, _ = channel.receive(sock)
        except channel.ChannelClosed:
            self._end()
            _log.error("what loads network rules has died (%s)", process.returncode)
            return None
        except BaseException:
            # The answer, if there is going to be one, must not be taken for the next request's.
            process.kill()
            self._end()
            raise
        return answer

    def _wait(self, process: Process, sock: socket.socket) -> None:
        poller, patience = select.poll(), Patience(_TIMEOUT, lambda: [process.pid])
        poller.register(sock, select.POLLIN)
        while not poller.poll(patience.poll_interval * 1000):
            if patience.exhausted():
                raise HostFault(f"Network rules cannot be loaded: what does it {patience.reason}.")

    def _start(self) -> tuple[Process, socket.socket]:
        with contextlib.ExitStack() as undo:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            # Of the process, not of this thread, which may be in a slot's.
            with theirs, _descriptor("/proc/self/ns/net") as home:
                fds = [theirs.fileno(), home]
                argv = [sys.executable, "-m", _MODULE, *map(str, fds)]
                process = spawn(argv, log=self._log, cwd=_PACKAGE_PARENT, pass_fds=fds)
            undo.pop_all()
        ours.settimeout(scaled(_TIMEOUT))
        self._started = process, ours
        return self._started

    def _end(self) -> None:
        if self._started is not None:
            process, sock = self._started
            self._started = None
            sock.close()
            wait_or_kill(process, _CLOSE_SECONDS)


def _output(answer: Mapping[str, Any]) -> str:
    if (refused := answer.get("refused")) is not None:
        raise HostFault(f"The network rules of a sandbox cannot be loaded: {refused}")
    if (unavailable := answer.get("unavailable")) is not None:
        raise HostUnavailable(f"{unavailable}. Install nftables with its library.")
    return str(answer["output"])


@contextmanager
def _descriptor(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
