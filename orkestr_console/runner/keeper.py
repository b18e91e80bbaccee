"""Keeps the installation's programs running with its own supervisord, controlled over a socket.

supervisord restarts what crashes, with growing delays, and rotates the logs. Every program asks the
kernel to signal it when supervisord dies (PR_SET_PDEATHSIG, prctl(2)), and supervisord when
`manage.py up` dies, so even ``kill -9`` leaves nothing running.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections import deque
from collections.abc import Callable, Sequence
from configparser import RawConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from supervisor.xmlrpc import SupervisorTransport, UnixStreamHTTPConnection

from hostruntime.host.patience import Patience, process_tree, scaled
from orkestr_console.runner.layout import Layout, StartError

LOG_BYTES = 10 * 1024 * 1024
LOG_BACKUPS = 3
TAIL_LINES = 20
NO_WAIT = False
# A program that crashes at startup may only have started too early: supervisord retries it after
# one second, then two, then three.
MAX_CRASHES = 4
START_SECONDS = 15
STOP_SECONDS = 60
# supervisord itself answers quickly, but the machine may be busy.
CALL_SECONDS = 30
# Between two checks of a starting program. On a slow machine, checks themselves slow it down.
MIN_POLL_SECONDS, MAX_POLL_SECONDS = 0.05, 1.0
# How often a wait is reported to the operator.
REPORT_SECONDS = 15.0

Report = Callable[[str], None]


class ManagerUnresponsive(Exception):  # noqa: N818 - what it is
    """supervisord does not answer: it has exited, or hangs."""


@dataclass(frozen=True)
class Program:
    """One program to keep running. Lower ``priority`` stops later."""

    name: str
    command: Sequence[str]
    priority: int
    stop_signal: str = "TERM"
    stop_seconds: int = 15
    stop_group: bool = False


class Keeper:
    """The supervisord of one `manage.py up`."""

    def __init__(self, layout: Layout, programs: Sequence[Program]) -> None:
        self._layout = layout
        self._programs = programs
        self._config = layout.run / "supervisord.conf"
        self._socket = layout.manager_socket
        self._process: subprocess.Popen[bytes] | None = None
        self._log_offsets: dict[str, int] = {}
        self._output: deque[str] = deque(maxlen=TAIL_LINES)

    def start(self) -> None:
        """Start supervisord itself, with no program running yet. Raises ``StartError``."""
        self._socket.unlink(missing_ok=True)
        self._write_config()
        command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(self._config)]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig=TERM", "--", *command],
            cwd=self._layout.tree,
            env={**os.environ, **self._layout.environment()},
            stdin=subprocess.DEVNULL,
            # Not to a file: it dies if it cannot write an error, as on a full disk.
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches `up` alone, which then stops everything in order.
            start_new_session=True,
        )
        threading.Thread(target=self._read_output, args=[self._process.stdout], daemon=True).start()
        if not wait_until(self._responds, START_SECONDS, self._process):
            raise StartError(f"the process manager did not start:\n{self.output_tail()}")

    def _read_output(self, output: IO[bytes]) -> None:
        with output:
            self._output.extend(line.decode(errors="replace").rstrip() for line in output)

    def output_tail(self) -> str:
        """The end of supervisord's output outside its log, indented for a terminal."""
        return _indented(list(self._output))

    def _write_config(self) -> None:
        config = RawConfigParser()
        config["supervisord"] = {
            "logfile": str(self._layout.log / "supervisord.log"),
            "pidfile": str(self._layout.run / "supervisord.pid"),
            "user": "root",
            # It has a log file; standard output is for what it cannot log.
            "silent": "true",
        }
        config["unix_http_server"] = {"file": str(self._socket), "chmod": "0700"}
        config["rpcinterface:supervisor"] = {
            "supervisor.rpcinterface_factory": ("supervisor.rpcinterface:make_main_rpcinterface")
        }
        for program in self._programs:
            config[f"program:{program.name}"] = self._section(program)
        for section in config.sections():
            for name, value in config.items(section):
                # supervisord expands %(name)s in every value.
                config.set(section, name, value.replace("%", "%%"))
        with self._config.open("w") as stream:
            config.write(stream)
        self._config.chmod(0o600)

    def _section(self, program: Program) -> dict[str, str]:
        group = str(program.stop_group).lower()
        return {
            "command": shlex.join(program.command),
            "directory": str(self._layout.tree),
            "priority": str(program.priority),
            "autostart": "false",
            "autorestart": "true",
            "startsecs": "1",
            "startretries": "8",
            "stopsignal": program.stop_signal,
            "stopwaitsecs": str(round(scaled(program.stop_seconds))),
            "stopasgroup": group,
            "killasgroup": group,
            "redirect_stderr": "true",
            "stdout_logfile": str(self._log(program.name)),
            "stdout_logfile_maxbytes": str(LOG_BYTES),
            "stdout_logfile_backups": str(LOG_BACKUPS),
        }

    def launch(self, name: str) -> None:
        """Start one program without waiting; :meth:`await_ready` reports crashes."""
        self._log_offsets[name] = self._log_size(name)
        self.revive(name)

    def await_ready(
        self, name: str, ready: Callable[[], bool], seconds: float, report: Report = lambda _: None
    ) -> None:
        """Wait until ``ready()``. Raises ``StartError`` with the end of the program's log.

        A program that keeps crashing as it starts is given up on soon; one that is slow is waited
        for as long as it works, and one that does nothing gets ``seconds``
        (:class:`hostruntime.host.patience.Patience`). ``say`` is told now and then that it takes
        time.
        """
        patience = Patience(
            seconds,
            lambda: process_tree(self.states()[name][1]),
            marker=lambda: self._log_size(name),
        )
        starts: set[int] = set()
        started = last_report = time.monotonic()
        delay = MIN_POLL_SECONDS
        while not ready():
            if self._crashed(name, starts):
                raise self._not_ready(name, "crashed as it started")
            if patience.exhausted():
                raise self._not_ready(name, f"is not ready: it {patience.reason}")
            if time.monotonic() > last_report + REPORT_SECONDS:
                last_report = time.monotonic()
                report(f"waiting for {name}, at work for {last_report - started:.0f} s")
            time.sleep(delay)
            delay = min(delay * 1.2, MAX_POLL_SECONDS)

    def _crashed(self, name: str, starts: set[int]) -> bool:
        """Whether a program keeps crashing; collects its start times in ``starts``."""
        info = next(info for info in self._process_info() if info["name"] == name)
        starts |= {info["start"]} - {0}
        down = info["statename"] in {"BACKOFF", "FATAL", "EXITED"}
        crashes = len(starts) - (0 if down else 1)
        return info["statename"] == "FATAL" or crashes >= MAX_CRASHES

    def _not_ready(self, name: str, problem: str) -> StartError:
        end = tail(self._log(name), self._log_offsets[name])
        return StartError(f"{name} {problem}; {self._log(name)} ends with:\n{end}")

    def _log_size(self, name: str) -> int:
        log = self._log(name)
        return log.stat().st_size if log.exists() else 0

    def _log(self, name: str) -> Path:
        return self._layout.log / f"{name}.log"

    def states(self, seconds: float | None = None) -> dict[str, tuple[str, int]]:
        """Each program's supervisord state name and process id (0 when not running).

        Raises ``ManagerUnresponsive`` if there is no answer within ``seconds``, by default within a
        limit that is longer on a slow machine.
        """
        return {
            info["name"]: (info["statename"], info["pid"]) for info in self._process_info(seconds)
        }

    def revive(self, name: str) -> None:
        """Start a program, even one that supervisord has given up on; ignores a crash."""
        try:
            self._call("startProcess", name, NO_WAIT)
        except xmlrpc.client.Fault:
            return

    def replace(self, name: str) -> None:
        """Kill a hung program and its child processes; supervisord restarts it."""
        for pid in process_tree(self.states()[name][1]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """Kill a hung supervisord; its programs exit with it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def manager(self) -> list[int]:
        """supervisord's process id, if it was started."""
        return [self._process.pid] if self._process is not None else []

    def alive(self) -> bool:
        """Whether supervisord itself runs."""
        return self._process is not None and self._process.poll() is None

    def _responds(self) -> bool:
        """Whether it answers: it listens some time after its socket appears."""
        try:
            self._call("getState")
        except ManagerUnresponsive:
            return False
        return True

    def stop(self) -> None:
        """Stop every program in order, then supervisord. Can be called at any time."""
        if self._process is None:
            return
        self._process.terminate()
        if not wait_until(lambda: not self.alive(), STOP_SECONDS, self._process):
            # Its programs exit with it, each by its parent-death signal.
            self._process.kill()
            self._process.wait()
        self._socket.unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """Every process of every program; none if supervisord doesn't answer."""
        try:
            running = [pid for _, pid in self.states().values() if pid]
        except ManagerUnresponsive:
            return []
        return [pid for program in running for pid in process_tree(program)]

    def tail(self, log: str) -> str:
        """The end of one file of the log directory."""
        return tail(self._layout.log / log)

    def _process_info(self, seconds: float | None = None) -> list[dict[str, Any]]:
        answer = self._call("getAllProcessInfo", seconds=seconds)
        return answer if isinstance(answer, list) else []

    def _call(self, method: str, *arguments: object, seconds: float | None = None) -> object:
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        limit = scaled(CALL_SECONDS) if seconds is None else seconds
        transport._get_connection = lambda: _Connection(str(self._socket), limit)
        try:
            # The address is ignored: the transport connects to the socket.
            with xmlrpc.client.ServerProxy("http://localhost", transport=transport) as server:
                return getattr(server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            raise ManagerUnresponsive(f"the process manager does not answer: {error}") from error


class _Connection(UnixStreamHTTPConnection):  # type: ignore[misc]
    """supervisord's own connection with a timeout, which it lacks."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost")
        self.socketfile = path
        self._seconds = seconds

    def connect(self) -> None:
        """Connect to the Unix socket."""
        super().connect()
        self.sock.settimeout(self._seconds)


def wait_until(ready: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes]) -> bool:
    """Poll ``ready`` until it is true, ``process`` exits, or it is idle for ``seconds``."""
    patience = Patience(seconds, lambda: process_tree(process.pid))
    while not ready():
        if process.poll() is not None or patience.exhausted():
            return False
        time.sleep(0.1)
    return True


def tail(log: Path, offset: int = 0) -> str:
    """The last lines written to ``log`` after ``offset``, indented for a terminal."""
    if not log.exists():
        return "    (it wrote nothing)"
    with log.open("rb") as stream:
        stream.seek(max(offset, log.stat().st_size - 64 * 1024))
        return _indented(stream.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) or "    (it wrote nothing)"
