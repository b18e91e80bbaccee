"""A booted machine as one who logs in sees it: commands over ssh, files, a tunnel."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.vm.image import CLONE, PERSON
from tests.vm.places import TREE, VmError

_LOGIN_SECONDS = 60.0
_COMMAND_SECONDS = 900.0
_TAIL = 3000
_SETTLED = {"running", "degraded"}


@dataclass(frozen=True)
class Said:
    """A command that ended in the guest: its exit status and its words."""

    command: str
    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"`{self.command}` ended with {self.status}\n{(self.out + self.err)[-_TAIL:]}"


class Guest:
    """The machine behind a port on loopback. Every method raises VmError when ssh fails."""

    def __init__(self, port: int, key: Path) -> None:
        self.port = port
        self._key = key

    def root(self, command: str, *, timeout: float = _COMMAND_SECONDS, check: bool = True) -> Said:
        """Run a shell command as root."""
        return self._say("root", command, timeout, check)

    def person(
        self, command: str, *, timeout: float = _COMMAND_SECONDS, check: bool = True
    ) -> Said:
        """Run a shell command as the person with sudo, in a login session of their own."""
        return self._say(PERSON, command, timeout, check)

    def is_up(self) -> bool:
        """Whether systemd has started all it was to start."""
        try:
            said = self.root("systemctl is-system-running", timeout=_LOGIN_SECONDS, check=False)
        except VmError:
            return False
        return said.out.strip() in _SETTLED

    def await_gone(self, boot: str, seconds: float) -> None:
        """Wait until this boot of it is over. Raises VmError."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                if self.boot_id() != boot:
                    return
            except VmError:
                return
            time.sleep(1)
        raise VmError(f"the machine did not go down within {seconds:g} s")

    def boot_id(self) -> str:
        """What tells one boot from another."""
        return self.root("cat /proc/sys/kernel/random/boot_id", timeout=_LOGIN_SECONDS).out.strip()

    def push(self, commit: str) -> None:
        """Put a commit of this tree into the person's clone, as `git pull` would."""
        branch = "refs/heads/pushed"
        remote = f"ssh://{PERSON}@127.0.0.1:{self.port}/{CLONE}"
        environment = {"GIT_SSH_COMMAND": " ".join(["ssh", *self._options()])}
        done = subprocess.run(
            ["git", "-C", str(TREE), "push", "-q", "--force", remote, f"{commit}:{branch}"],
            env={"PATH": "/usr/bin:/bin", "HOME": "/root", **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise VmError(f"git could not push into the guest: {done.stderr}")
        self.person(f"cd /{CLONE} && git checkout -q --force -B main pushed")

    @contextmanager
    def tunnel(self, port: int) -> Iterator[int]:
        """A port on loopback here that leads to ``port`` on loopback there."""
        here = free_port()
        command = ["ssh", "-N", *self._options(), "-L", f"127.0.0.1:{here}:127.0.0.1:{port}"]
        command += ["-o", "ExitOnForwardFailure=yes", "-p", str(self.port), "root@127.0.0.1"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            _await_listener(here, process)
            yield here
        finally:
            process.kill()
            process.wait()

    def ssh(self, user: str) -> list[str]:
        """The ssh command line that logs ``user`` in."""
        return ["ssh", *self._options(), "-p", str(self.port), f"{user}@127.0.0.1"]

    def _options(self) -> list[str]:
        return [
            *("-i", str(self._key), "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"),
            *("-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=20"),
            *("-o", "ServerAliveInterval=60", "-o", "IdentitiesOnly=yes"),
        ]

    def _say(self, user: str, command: str, timeout: float, check: bool) -> Said:
        try:
            done = subprocess.run(
                [*self.ssh(user), command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as slow:
            so_far = ((slow.stdout or b"") + (slow.stderr or b""))[-_TAIL:].decode(errors="replace")
            raise VmError(f"`{command}` did not end within {timeout:g} s; {so_far}") from None
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        said = Said(command, done.returncode, out, err)
        if done.returncode == 255:  # ssh(1): an error of its own
            raise VmError(f"ssh: {said}")
        if check and done.returncode != 0:
            raise VmError(str(said))
        return said


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _await_listener(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _LOGIN_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.2)
    raise VmError("ssh opened no tunnel into the guest")
