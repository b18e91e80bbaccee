"""A machine's disk, mounted here to be filled at this machine's speed.

The whole program runs in a mount namespace of its own (:func:`enter_own_mounts`), and what runs in
the disk runs in a process namespace of its own: however the program ends, no mount and no process
of it stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hostruntime.host.run import Completed, run

Say = Callable[[str], None]
_QUICK = 120.0


def enter_own_mounts() -> None:
    """From here on nobody else sees what this process mounts, and it ends with this process."""
    os.unshare(os.CLONE_NEWNS)
    run(["mount", "--make-rprivate", "/"], timeout=_QUICK)


@contextmanager
def mounted(disk: Path, at: Path) -> Iterator[Path]:
    """The file system in the file ``disk``, mounted at ``at`` for the length of a block."""
    at.mkdir(exist_ok=True)
    run(["mount", "-o", "loop", str(disk), str(at)], timeout=_QUICK)
    try:
        yield at
    finally:
        # Nothing below may stay: the disk is booted next. A copy in another namespace cannot be.
        run(["umount", "--recursive", str(at)], timeout=_QUICK)


@contextmanager
def usable(root: Path) -> Iterator[None]:
    """Devices, and this machine's resolver, for programs that run in ``root``."""
    resolver = root / "etc/resolv.conf"
    kept = resolver.read_bytes() if resolver.is_file() else b""
    resolver.unlink(missing_ok=True)
    resolver.write_bytes(Path("/etc/resolv.conf").read_bytes())
    run(["mount", "--bind", "/dev", str(root / "dev")], timeout=_QUICK)
    try:
        yield
    finally:
        run(["umount", str(root / "dev")], timeout=_QUICK)
        resolver.write_bytes(kept)


def inside(
    root: Path,
    argv: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
    on_line: Say | None = None,
) -> Completed:
    """Run a program in ``root`` with /proc and its own host name; nothing it started outlives it.

    Raises CommandFailed.
    """
    fence = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
    named = ["sh", "-c", 'hostname "$(cat /etc/hostname)" && exec "$@"', "sh"]
    command = [*fence, f"--root={root}", "--wd=/", *named, *argv]
    return run(command, timeout=timeout, env=env, on_line=on_line)
