"""Starts a container by lxc-start(1), whose process becomes the container's monitor.

Called in this process, liblxc would make the monitor a fork of it, and what Python writes to while
it starts a container, 2.5 MB, would be the monitor's own for as long as the container runs.

The program is executed from a copy in memory.  Debian's AppArmor profile for /usr/bin/lxc-start
attaches by that path, and only allows containers the profiles of LXC's own: the copy runs as
liblxc does in this process.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

PROGRAM = Path("/usr/bin/lxc-start")
# For where memory must not be executed unless asked for (vm.memfd_noexec), since Linux 6.3.
_MFD_EXEC = 0x10


class Startable(Protocol):
    """What is needed of an ``lxc.Container`` with its configuration set."""

    name: str

    def save_config(self, path: str) -> bool:
        """Write the configuration to a file."""

    def get_config_path(self) -> str:
        """LXC's directory (lxcpath)."""


def copy_program(program: Path = PROGRAM) -> int:
    """A descriptor of a copy in memory of lxc-start.  Raises OSError if it is not installed."""
    data = program.read_bytes()
    try:
        copy = os.memfd_create(program.name, os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:
        copy = os.memfd_create(program.name, os.MFD_CLOEXEC)
    with open(copy, "wb", closefd=False) as file:
        file.write(data)
    os.fchmod(copy, 0o500)
    return copy


def start(program: int, container: Startable) -> bool:
    """Start a configured container and wait until it runs, or has failed; whether it runs.

    ``program`` is from :func:`copy_program`.  Raises OSError.
    """
    config = os.memfd_create("lxc.conf")
    try:
        path = f"/proc/{os.getpid()}/fd/{config}"
        if not container.save_config(path):
            raise OSError(f"LXC could not write the configuration of {container.name}")
        # -C: the monitor, a daemon, must keep nothing of ours open.
        argv = ["lxc-start", "-n", container.name, "-P", container.get_config_path()]
        argv += ["-f", path, "-d", "-C"]
        _, status = os.waitpid(os.posix_spawn(f"/proc/self/fd/{program}", argv, os.environ), 0)
    finally:
        os.close(config)
    return status == 0
