"""The only place that starts programs on the host.

Programs get a minimal environment (nothing of the agent's own leaks into them), a session of
their own (so that giving up on one kills the program *and* its children), and stdin from /dev/null
unless input is provided.  A failure carries the command line and the end of the output.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from hostruntime.errors import HostFault
from hostruntime.host.patience import Patience, process_tree, scaled

MINIMAL_ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}
_TAIL_BYTES = 2000
_LINGER_SECONDS = 2.0

Process = subprocess.Popen[bytes]
"""A program started by :func:`spawn`."""


@dataclass(frozen=True)
class Completed:
    """A finished program: its command line, exit status (−n = killed by signal n) and output."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text, undecodable bytes replaced."""
        return self.stdout.decode("utf-8", "replace")


class CommandFailed(HostFault):
    """A program exited with an error, was killed, hung or could not be started."""

    def __init__(self, argv: Sequence[str], reason: str, output: bytes = b"") -> None:
        tail = output[-_TAIL_BYTES:].decode("utf-8", "replace").strip()
        output_note = f" It said: {tail}" if tail else ""
        super().__init__(f"`{shlex.join(argv)}` {reason}.{output_note}")
        self.argv = tuple(argv)
        self.output = output


def run(
    argv: Sequence[str],
    *,
    input: bytes | None = None,  # noqa: A002 - the name subprocess.run uses
    timeout: float | None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Completed:
    """Run a program until it exits and return its output.

    ``timeout`` is how many seconds it and its children may be idle; the time it works does not
    count, up to ten times as much (:class:`hostruntime.host.patience.Patience`).  None waits
    forever: only for programs that cannot hang.  ``env`` is added to :data:`MINIMAL_ENVIRONMENT`.
    ``on_line`` is called, from another thread, with each line of stdout and stderr as it is
    written.

    Raises :class:`CommandFailed` if it cannot start or times out (its process group is killed), or
    if ``check`` is set and the status is not zero.
    """
    process = _popen(argv, stdin=subprocess.PIPE if input is not None else None, env=env, cwd=cwd)
    readers = [_Reader(process.stdout, on_line), _Reader(process.stderr, on_line)]
    try:
        _write_input(process, input)
        reason = _wait_until_stalled(process, timeout)
    except BaseException:
        _kill_group(process)
        raise
    if reason:
        _kill_group(process)
    out, err = _join(readers)
    if reason:
        raise CommandFailed(argv, reason, err)
    if check and process.returncode != 0:
        raise CommandFailed(argv, _describe_exit(process.returncode), err or out)
    return Completed(tuple(argv), process.returncode, out, err)


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Process:
    """Start a long-running program in its own session, with its output appended to ``log``.

    The caller owns the process and must stop and reap it.  Raises :class:`CommandFailed` if the
    program cannot be started.
    """
    with log.open("ab") as sink:
        return _popen(argv, stdout=sink, stderr=sink, env=env, cwd=cwd, pass_fds=pass_fds)


def wait_or_kill(process: Process, timeout: float) -> None:
    """Wait for a program to exit, kill it if it is idle for ``timeout`` seconds, and reap it."""
    if _wait_until_stalled(process, timeout):
        process.kill()
        process.wait()


def _wait_until_stalled(process: Process, timeout: float | None) -> str:
    """Wait for a program; return why it timed out, or an empty string once it has exited."""
    if timeout is None:
        process.wait()
        return ""
    patience = Patience(timeout, lambda: process_tree(process.pid))
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience.poll_interval)
            return ""
        if patience.exhausted():
            return patience.reason


def _popen(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | IO[bytes] = subprocess.PIPE,
    stderr: int | IO[bytes] = subprocess.PIPE,
    env: Mapping[str, str] | None,
    cwd: Path | None,
    pass_fds: Sequence[int] = (),
) -> Process:
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else stdin,
            stdout=stdout,
            stderr=stderr,
            env={**MINIMAL_ENVIRONMENT, **(env or {})},
            cwd=cwd or "/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
    except OSError as error:
        raise CommandFailed(argv, f"could not be started: {error.strerror}") from error


class _Reader:
    """Drains one pipe in a thread, so that neither pipe can fill up and block the program."""

    def __init__(self, pipe: IO[bytes] | None, on_line: Callable[[str], None] | None) -> None:
        self._chunks: list[bytes] = []
        self._pipe = pipe
        self._on_line = on_line
        self._thread = threading.Thread(target=self._drain, daemon=True)
        self._thread.start()

    @property
    def data(self) -> bytes:
        return b"".join(self._chunks)

    def _drain(self) -> None:
        if self._pipe is None:
            return
        with self._pipe as pipe:
            for line in pipe:
                self._chunks.append(line)
                if self._on_line is not None:
                    self._on_line(line.decode("utf-8", "replace").rstrip("\r\n"))

    def join(self) -> bytes:
        # A daemonised grandchild may keep the pipe open after the program itself has exited; but
        # all output written before that must be read, however slowly this thread is scheduled.
        patience = Patience(scaled(_LINGER_SECONDS), marker=lambda: len(self._chunks))
        while self._thread.is_alive() and not patience.exhausted():
            self._thread.join(patience.poll_interval)
        return self.data


def _join(readers: Sequence[_Reader]) -> tuple[bytes, bytes]:
    return readers[0].join(), readers[1].join()


def _write_input(process: Process, data: bytes | None) -> None:
    """Write a program's input in a thread, as a program that hangs does not read."""
    pipe = process.stdin
    if data is None or pipe is None:
        return

    def write() -> None:
        # It may exit without reading everything; its exit status says whether that is an error.
        with contextlib.suppress(BrokenPipeError), pipe:
            pipe.write(data)

    threading.Thread(target=write, daemon=True).start()


def _kill_group(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _describe_exit(returncode: int) -> str:
    if returncode < 0:
        return f"was killed by {signal.Signals(-returncode).name}"
    return f"exited with status {returncode}"
