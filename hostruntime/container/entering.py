"""Entering a running container: creating a process confined like those that init starts.

LXC's own attach is not used.  It leaks a descriptor with every call, runs Python's after-fork
handlers without the before-fork ones, which crashes Python 3.13, and reads and compiles its
configuration anew each time.  This module does the same, in this order:

1. the launcher forks; the child joins all of init's namespaces at once, by its pidfd (setns(2));
2. there it becomes root of the container's user namespace, drops capabilities from its bounding
   set, and installs the system-call filter, the AppArmor profile and the container's capabilities;
3. once confined, it clones the actual process, as the launcher's own child.  Only that process is
   in the pid namespace, so nobody inside ever sees one that is less confined than it should be;
4. the launcher moves that process into the container's control groups and lets it proceed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hostruntime.container.cgroups import cgroup_layout, pid_inside
from hostruntime.container.config import CAPABILITIES
from hostruntime.host import kernel

_KEPT_CAPABILITIES = frozenset(kernel.CAPABILITY_NUMBERS[name] for name in CAPABILITIES)
_LABEL_PATHS = (Path("/proc/self/attr/apparmor/current"), Path("/proc/self/attr/current"))
_MAX_REPORT_BYTES = 4096
_MAX_REASON_CHARACTERS = 500


class EnteringFailed(Exception):  # noqa: N818 - an answer to the agent
    """No process could enter the container; the text says why, ``errno`` is the kernel's error."""

    def __init__(self, text: str, errno: int | None = None) -> None:
        super().__init__(text)
        self.errno = errno


@dataclass(frozen=True)
class Confinement:
    """How a process inside is confined, in addition to its namespaces and groups.

    ``dropped`` are the capabilities to remove from its bounding set; ``label`` is the AppArmor
    profile, if the kernel has AppArmor.
    """

    filter: kernel.SyscallFilter
    dropped: tuple[int, ...]
    label: str | None = None

    @classmethod
    def of(cls, program: bytes, label: str | None) -> Confinement:
        """The confinement for this kernel, with a filter's program
        (:mod:`hostruntime.container.seccomp`)."""
        capabilities = range(kernel.last_capability() + 1)
        dropped = tuple(number for number in capabilities if number not in _KEPT_CAPABILITIES)
        return cls(kernel.SyscallFilter(program), dropped, label)


@dataclass(frozen=True)
class Doorway:
    """What is needed to enter one running container: its init's pidfd, and its groups.

    ``own_groups`` are this process's own, in the same hierarchies.
    """

    pidfd: int
    groups: tuple[Path, ...]
    own_groups: tuple[Path, ...] = ()

    @classmethod
    def find(cls, name: str) -> Doorway:
        """The doorway of the container of this name.  Raises EnteringFailed if it has exited."""
        layout = cgroup_layout()
        groups = layout.container(name)
        init = groups.init_pid()
        if init is None:
            raise EnteringFailed("The container does not run.")
        try:
            pidfd = os.pidfd_open(init)
        except ProcessLookupError as error:
            raise EnteringFailed("The container has just ended.") from error
        # The pid may have been reused between the two calls; the pidfd cannot be.
        if groups.init_pid() != init:
            os.close(pidfd)
            raise EnteringFailed("The container has just ended.")
        return cls(pidfd, tuple(groups.command_groups()), tuple(groups.own_groups()))

    def move_in(self, pid: int, group: Path | None) -> None:
        """Move a process into the container's groups.

        ``group`` is the command's own group in the unified hierarchy, created if necessary; None
        uses the container's.  Raises OSError.
        """
        *others, unified = self.groups
        if group is not None:
            with contextlib.suppress(FileExistsError):
                os.mkdir(group)  # noqa: PTH102 - for each command
            unified = group
        _move(pid, (*others, unified))

    def move_out(self, pid: int) -> None:
        """Move a process into this process's own groups, as far as it still exists."""
        for group in self.own_groups:
            with contextlib.suppress(OSError):
                _move(pid, [group])

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.pidfd)


def enter(
    doorway: Doorway, confinement: Confinement, group: Path | None, action: Callable[[], NoReturn]
) -> tuple[int, int | None]:
    """Run ``action`` in the container, in a new child of this process.

    ``group`` is the command's own group in the unified hierarchy, created if necessary; None uses
    the container's.  Before ``action`` executes anything of the container's, it must wait until it
    is signalled that it is in its groups.  Returns its pids, here and inside; the caller reaps it.
    Raises EnteringFailed, OSError; then nothing is left inside.
    """
    pid = _spawn_inside(doorway, confinement, action)
    try:
        doorway.move_in(pid, group)
        return pid, pid_inside(pid)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _move(pid: int, groups: Sequence[Path]) -> None:
    data = str(pid).encode()
    # Not Path.write_text: there are ten of these writes for each command.
    for group in groups:
        descriptor = os.open(f"{group}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


def _spawn_inside(
    doorway: Doorway, confinement: Confinement, action: Callable[[], NoReturn]
) -> int:
    report_out, report_in = os.pipe()
    try:
        try:
            intermediate = os.fork()
            if intermediate == 0:
                _enter_and_spawn(doorway, confinement, action, report_in)
        finally:
            os.close(report_in)
        report = os.read(report_out, _MAX_REPORT_BYTES)
    finally:
        os.close(report_out)
    os.waitpid(intermediate, 0)
    pid, reason, errno = json.loads(report) if report else (None, "it was killed on the way", None)
    if pid is None:
        raise EnteringFailed(f"No process could enter the container: {reason}.", errno)
    return int(pid)


def _enter_and_spawn(
    doorway: Doorway, confinement: Confinement, action: Callable[[], NoReturn], report: int
) -> NoReturn:
    """Join the container, confine this process, clone one there and report the outcome."""
    try:
        join(doorway.pidfd, confinement)
        pid = kernel.clone_as_sibling()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the launcher is to know
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]
        _report(report, None, reason, getattr(error, "errno", None))
        os._exit(1)
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    _report(report, pid)
    os._exit(0)


def join(pidfd: int, confinement: Confinement) -> None:
    """Join the container of that init, and confine this process like everything in there.

    Its next child will be in the container's pid namespace; it itself is not (setns(2)).  Raises
    OSError; then it must exit.
    """
    label = _open_label() if confinement.label is not None else None
    os.setns(pidfd, kernel.ALL_NAMESPACES)
    _become_container_root()
    _confine(confinement, label)


def _open_label() -> int:
    """Open this process's label while its /proc is still accessible (apparmor(7))."""
    path = next((path for path in _LABEL_PATHS if path.exists()), _LABEL_PATHS[-1])
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC)


def _become_container_root() -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # That set it to fs.suid_dumpable (proc(5)), and 1 would let root inside trace this process.
    kernel.set_dumpable(dumpable=False)


def _confine(confinement: Confinement, label: int | None) -> None:
    # The filter needs a capability that is dropped last, and that the profile does not grant.
    kernel.drop_from_bounding_set(confinement.dropped)
    confinement.filter.install()
    if label is not None:
        os.write(label, f"changeprofile {confinement.label}".encode())
        os.close(label)
    kernel.set_capabilities(_KEPT_CAPABILITIES)


def _report(descriptor: int, pid: int | None, reason: str = "", errno: int | None = None) -> None:
    os.write(descriptor, json.dumps([pid, reason, errno]).encode())
