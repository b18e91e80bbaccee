"""Run a program as an unprivileged user who sees only the needed parts of private directories.

A system user cannot reach a clone under ``/root`` or a ``0700`` home, or a Python installed there
by pyenv or uv. Rather than opening those directories, or running as root, the program gets its own
mount namespace, in which each closed directory is an empty one with only bind mounts of the paths
it needs. Mounts of others (sandboxes, builds) are detached in that namespace first, so that it
never keeps one alive (mount_namespaces(7)).

``python -m orkestr_console.runner.confine --user U [--need PATH]… -- argv…``, as root.
"""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import re
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hostruntime.host import kernel

SYSTEM_DIRECTORIES = (
    *("/", "/bin", "/etc", "/lib", "/lib64", "/opt", "/sbin", "/usr", "/usr/local"),
    *("/run", "/tmp", "/var", "/var/lib", "/var/log", "/var/tmp"),
)
_ATTEMPTS = 10
KERNEL_DIRECTORIES = ("/dev", "/proc", "/sys")


def blocked_directory(user: str, path: Path) -> Path | None:
    """The outermost parent directory of ``path`` that ``user`` cannot traverse, if any."""
    entry = pwd.getpwnam(user)
    groups = set(os.getgrouplist(user, entry.pw_gid))
    for directory in reversed(path.parents):
        status = directory.stat()
        if status.st_uid == entry.pw_uid:
            allowed = status.st_mode & stat.S_IXUSR
        elif status.st_gid in groups:
            allowed = status.st_mode & stat.S_IXGRP
        else:
            allowed = status.st_mode & stat.S_IXOTH
        if not allowed:
            return directory
    return None


def outermost(paths: Iterable[Path]) -> list[Path]:
    """The distinct paths that are not inside another of them, in a stable order."""
    outer: list[Path] = []
    # Sorted by their parts, a path's contents follow it: comparing with the last is enough.
    for path in sorted(set(paths)):
        if not outer or not path.is_relative_to(outer[-1]):
            outer.append(path)
    return outer


def mount_points(mountinfo: str) -> list[Path]:
    """Mount points, innermost last, from the text of ``/proc/self/mountinfo`` (proc(5))."""
    fields = (line.split()[4] for line in mountinfo.splitlines() if line)
    return [Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field)) for field in fields]


def unneeded_mounts(mounts: Iterable[Path], needs: Sequence[Path]) -> list[Path]:
    """The outermost mounts that contain neither a need nor a system directory."""
    needed = [*needs, *map(Path, SYSTEM_DIRECTORIES)]
    ancestors = {above for path in needed for above in (path, *path.parents)}
    return [
        mount
        for mount in outermost(set(mounts) - ancestors)
        if not any(mount.is_relative_to(own) for own in KERNEL_DIRECTORIES)
    ]


def enter_private_view(user: str, needs: Sequence[Path]) -> None:
    """Move this process into a mount namespace in which ``user`` reaches ``needs``.

    Raises ``OSError`` or ``subprocess.CalledProcessError`` where the machine refuses; nothing
    outside this process is changed either way.
    """
    closed = outermost(d for need in needs if (d := blocked_directory(user, need)) is not None)
    if not closed:
        return
    os.unshare(os.CLONE_NEWNS)
    _run("mount", "--make-rprivate", "/")
    detach_mounts(needs)
    handles = {need: os.open(need, os.O_PATH) for need in outermost(needs)}
    for directory in closed:
        _run("mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "orkestr-view", str(directory))
    for need, handle in handles.items():
        if any(need.is_relative_to(directory) for directory in closed):
            need.mkdir(parents=True, exist_ok=True)
            # --no-canonicalize: the descriptor's link must reach mount(2) as it is, since the
            # path it reads as is now hidden.
            _run("mount", "--no-canonicalize", "--bind", f"/proc/{os.getpid()}/fd/{handle}", need)
        os.close(handle)


def detach_mounts(needs: Sequence[Path]) -> None:
    """Detach every mount that contains no need.

    A sandbox that ends removes its mount points, and the kernel then detaches the mounts on them
    here too (detach_mounts, rmdir(2)), so one that has already disappeared is not an error. Uses
    the system call, which also detaches submounts: umount(8) reads the mount table for each
    argument, and hundreds of sandboxes have thousands of mounts. Raises ``OSError``.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        unneeded = unneeded_mounts(mount_points(Path("/proc/self/mountinfo").read_text()), needs)
        if not unneeded:
            return
        for mount in unneeded:
            try:
                kernel.umount(mount, kernel.MNT_DETACH | kernel.UMOUNT_NOFOLLOW)
            except OSError:
                if attempt == _ATTEMPTS:
                    raise


def _run(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)


def drop_privileges_command(
    user: str, *, stop_signal: str = "TERM", group: str | None = None
) -> list[str]:
    """The setpriv(1) command that becomes ``user`` permanently and dies with its parent.

    With ``group``, it has only that group instead of the user's own.
    """
    entry = pwd.getpwnam(user)
    groups = ["--init-groups"] if group is None else [f"--groups={grp.getgrnam(group).gr_gid}"]
    return [
        *("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", *groups),
        *("--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"),
        *(f"--pdeathsig={stop_signal}", "--"),
    ]


def user_environment(user: str) -> dict[str, str]:
    """This process's environment with the variables that identify the user replaced."""
    entry = pwd.getpwnam(user)
    return {**os.environ, "HOME": entry.pw_dir, "USER": user, "LOGNAME": user}


def main(argv: Sequence[str]) -> None:
    """Become the confined program."""
    parser = argparse.ArgumentParser(prog="confine")
    parser.add_argument("--user", required=True)
    parser.add_argument("--need", type=Path, action="append", default=[])
    parser.add_argument("--stop-signal", default="TERM")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    enter_private_view(options.user, [need.resolve() for need in options.need])
    command = [
        *drop_privileges_command(options.user, stop_signal=options.stop_signal),
        *options.command,
    ]
    os.execvpe(command[0], command, user_environment(options.user))


if __name__ == "__main__":
    main(sys.argv[1:])
