"""Entering a running container: making a process that is in there just as what init started is.

LXC's own attach is not used.  It leaves a descriptor behind with every call, runs Python's handlers
after a fork without those before it, which Python 3.13 dies of, and reads and compiles what it
needs anew each time.  What it sets is set here, in this order:

1. the launcher forks; the copy joins all of init's namespaces at once, by its pidfd (setns(2));
2. there it becomes root of the container's user namespace, gives up what its bounding set must not
   have, and installs the system-call filter, the AppArmor profile and the container's capabilities;
3. confined, it clones the process that is meant, as the launcher's own child.  Only that one is in
   the process namespace, so nobody inside ever sees one that is less confined than it should be;
4. the launcher puts that process into the container's control groups and opens its gate.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hostruntime.container.cgroups import cgroup_layout, pid_inside
from hostruntime.container.config import CAPABILITIES
from hostruntime.host import kernel

_KEPT = frozenset(kernel.CAPABILITY_NUMBERS[name] for name in CAPABILITIES)
_LABELS = (Path("/proc/self/attr/apparmor/current"), Path("/proc/self/attr/current"))
_MOST_REPORTED = 4096
_MOST_REPORTED_WORDS = 500


class EnteringFailed(Exception):  # noqa: N818 - an answer to the agent
    """Nothing could be put into the container; the text says why, ``errno`` the kernel's word."""

    def __init__(self, text: str, errno: int | None = None) -> None:
        super().__init__(text)
        self.errno = errno


@dataclass(frozen=True)
class Confinement:
    """What a process inside is held by, beside its namespaces and groups.

    ``dropped`` are the capabilities to take from its bounding set; ``label`` is the AppArmor
    profile, where the kernel has AppArmor.
    """

    filter: kernel.SyscallFilter
    dropped: tuple[int, ...]
    label: str | None = None

    @classmethod
    def of(cls, program: bytes, label: str | None) -> Confinement:
        """What this kernel is asked for, with a filter's program
        (:mod:`hostruntime.container.seccomp`)."""
        known = range(kernel.last_capability() + 1)
        dropped = tuple(number for number in known if number not in _KEPT)
        return cls(kernel.SyscallFilter(program), dropped, label)


@dataclass(frozen=True)
class Doorway:
    """The way into one container for as long as it runs: its init's pidfd, and its groups."""

    pidfd: int
    groups: tuple[Path, ...]

    @classmethod
    def find(cls, name: str) -> Doorway:
        """The doorway of the container of this name.  Raises EnteringFailed when it has ended."""
        groups = cgroup_layout().container(name)
        init = groups.init_pid()
        if init is None:
            raise EnteringFailed("The container does not run.")
        try:
            pidfd = os.pidfd_open(init)
        except ProcessLookupError as error:
            raise EnteringFailed("The container has just ended.") from error
        # Between the two a pid may have become somebody else's; from here on it cannot.
        if groups.init_pid() != init:
            os.close(pidfd)
            raise EnteringFailed("The container has just ended.")
        return cls(pidfd, tuple(groups.for_commands()))

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self.pidfd)


def enter(
    doorway: Doorway, confinement: Confinement, group: Path | None, inside: Callable[[], NoReturn]
) -> tuple[int, int | None]:
    """Have a new child of this process do ``inside`` in the container.

    ``group`` is the command's own in the unified hierarchy, made if need be; None leaves the
    process in the container's.  ``inside`` must wait, before it runs anything of the container's,
    until it is told that it has its place.  Returns its pids, here and inside; the caller waits for
    it.  Raises EnteringFailed, OSError; then nothing is left inside.
    """
    pid = _born_inside(doorway, confinement, inside)
    try:
        _put_into_groups(pid, doorway, group)
        return pid, pid_inside(pid)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _put_into_groups(pid: int, doorway: Doorway, group: Path | None) -> None:
    *others, unified = doorway.groups
    if group is not None:
        group.mkdir(exist_ok=True)
        unified = group
    for path in (*others, unified):
        (path / "cgroup.procs").write_text(str(pid))


def _born_inside(doorway: Doorway, confinement: Confinement, inside: Callable[[], NoReturn]) -> int:
    report_out, report_in = os.pipe()
    try:
        try:
            herald = os.fork()
            if herald == 0:
                _lead_in(doorway, confinement, inside, report_in)
        finally:
            os.close(report_in)
        report = os.read(report_out, _MOST_REPORTED)
    finally:
        os.close(report_out)
    os.waitpid(herald, 0)
    pid, why, errno = json.loads(report) if report else (None, "it was killed on the way", None)
    if pid is None:
        raise EnteringFailed(f"No process could enter the container: {why}.", errno)
    return int(pid)


def _lead_in(
    doorway: Doorway, confinement: Confinement, inside: Callable[[], NoReturn], report: int
) -> NoReturn:
    """Join the container, confined, and leave one process there; what became of it is reported."""
    try:
        label = _open_label() if confinement.label is not None else None
        os.setns(doorway.pidfd, kernel.ALL_NAMESPACES)
        _become_root_inside()
        _confine(confinement, label)
        pid = kernel.clone_as_sibling()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher is to know
        why = f"{type(error).__name__}: {error}"[:_MOST_REPORTED_WORDS]
        _report(report, None, why, getattr(error, "errno", None))
        os._exit(1)
    if pid == 0:
        try:
            inside()
        finally:
            os._exit(1)
    _report(report, pid)
    os._exit(0)


def _open_label() -> int:
    """This process's own label, opened before its /proc is out of sight (apparmor(7))."""
    path = next((path for path in _LABELS if path.exists()), _LABELS[-1])
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _become_root_inside() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # That made it what fs.suid_dumpable says (proc(5)), and 1 would let root inside look into it.
    kernel.set_dumpable(dumpable=False)


def _confine(confinement: Confinement, label: int | None) -> None:
    # The filter takes a capability that is given up last, and that the profile does not grant.
    kernel.drop_from_bounding_set(confinement.dropped)
    confinement.filter.install()
    if label is not None:
        os.write(label, f"changeprofile {confinement.label}".encode())
        os.close(label)
    kernel.set_capabilities(_KEPT)


def _report(descriptor: int, pid: int | None, why: str = "", errno: int | None = None) -> None:
    os.write(descriptor, json.dumps([pid, why, errno]).encode())
