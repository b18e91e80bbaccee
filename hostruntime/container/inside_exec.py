"""What an attached process does inside a container before it becomes the command.

Runs in a process that a launcher put there (:mod:`hostruntime.container.entering`): paths already
resolve inside the container, so nothing may be imported or opened lazily.  It must end with
``execve`` or ``_exit``.
"""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

SHELL = "@shell"
_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh")
_GATE, _STATUS = 3, 4
RESET_SIGNALS = tuple(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
"""The signals whose handling a command must not inherit."""
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


@dataclass(frozen=True)
class Command:
    """A command, and the descriptors it is started with.

    ``argv[0]`` may be :data:`SHELL`.  ``gate`` delivers one byte once the process is in its control
    groups; ``status`` is close-on-exec, so end-of-file there means that the command is running.
    """

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    stdin: int
    stdout: int
    stderr: int
    gate: int
    status: int


def become_command(command: Command) -> NoReturn:
    """Turn the attached process into the command; a failure is reported on ``status``."""
    code = _NOT_FOUND
    try:
        _arrange_descriptors(command)
        if os.read(_GATE, 1) != b"1":
            os._exit(_NOT_FOUND)
        _reset_process()
        refusal = _change_directory(command.cwd)
        if refusal is None:
            code, refusal = _execute(command)
        os.write(_STATUS, json.dumps(refusal).encode())
    finally:
        os._exit(code)


def _arrange_descriptors(command: Command) -> None:
    descriptors = (command.stdin, command.stdout, command.stderr, command.gate, command.status)
    # First duplicate them above their final numbers, then onto those.
    high = [_duplicate_above(fd) for fd in descriptors]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=number < _GATE)
    os.closerange(len(descriptors), 1 << 30)


def _duplicate_above(fd: int) -> int:
    copy = os.dup(fd)
    while copy <= _STATUS:
        copy = os.dup(fd)
    return copy


def _reset_process() -> None:
    os.setsid()
    os.umask(0o022)
    for number in RESET_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _change_directory(cwd: str) -> dict[str, str] | None:
    try:
        os.chdir(cwd)
    except OSError as error:
        detail = f"The working directory {cwd} cannot be entered: {error.strerror}."
        return {"code": "cwd_not_found", "detail": detail}
    return None


def _execute(command: Command) -> tuple[int, dict[str, str]]:
    name, *arguments = command.argv
    error_number = errno.ENOENT
    for path in candidates(name, command.env):
        try:
            title = path.rpartition("/")[2] if name == SHELL else name
            os.execve(path, [title, *arguments], dict(command.env))
        except OSError as error:
            if error.errno not in (None, errno.ENOENT, errno.ENOTDIR):
                error_number = error.errno
    description = "a shell" if name == SHELL else name
    code = _NOT_FOUND if error_number == errno.ENOENT else _NOT_EXECUTABLE
    detail = f"The command {description} cannot be run in this image: {os.strerror(error_number)}."
    return code, {"code": "command_not_found", "detail": detail}


def candidates(name: str, env: Mapping[str, str]) -> Sequence[str]:
    """The files that may be a command's program, in order; ``name`` may be :data:`SHELL`."""
    if name == SHELL:
        return _SHELLS
    if "/" in name:
        return [name]
    return [f"{directory}/{name}" for directory in env.get("PATH", "").split(":") if directory]
