"""What a test run may leave on the host: nothing. Seen from outside, not asked of our own code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from orkestr_console.runner.confine import mount_points
from tests.processes import command_lines

CLAIMS = Path("/run/orkestr/instances")
CGROUPS = Path("/sys/fs/cgroup")
# By themselves, or in a unit that systemd has delegated; LXC's own choice would be its payload.
CGROUP_NAMES = ("ork[0-9]*", "*/ork[0-9]*", "*/lxc.payload.ork*", "lxc.payload.ork*")


def leftovers(root: Path, before: frozenset[str] = frozenset()) -> list[str]:
    """All on the host that belongs to a run in ``root``, from processes to loop devices.

    Names of the host runtime count when they were not in ``before`` and no living installation
    elsewhere has claimed their instance number.
    """
    # Asked on both sides of the look: an installation elsewhere may start or end meanwhile.
    foreign = foreign_instances(root)
    new = host_names() - before
    foreign |= foreign_instances(root)
    named = sorted(name for name in new if instance_of(name) not in foreign)
    mounted = [f"mount {path}" for path in mounts() if path.is_relative_to(root)]
    looped = [f"loop device on {path}" for path in loops() if path.is_relative_to(root)]
    return [*named, *mounted, *looped, *processes_of(root)]


def host_names() -> frozenset[str]:
    """Every link, namespace, nft table, cgroup and profile named the way the host runtime names."""
    links = (f"link {path.name}" for path in Path("/sys/class/net").glob("ork*"))
    spaces = (f"netns {path.name}" for path in Path("/run/netns").glob("ork*"))
    cgroups = (f"cgroup {path}" for pattern in CGROUP_NAMES for path in CGROUPS.glob(pattern))
    return frozenset([*links, *spaces, *cgroups, *_tables(), *_profiles()])


def foreign_instances(root: Path) -> set[str]:
    """Instance numbers claimed by state directories that exist outside ``root``."""
    found = set()
    for claim in CLAIMS.glob("[0-9]*"):
        try:
            holder = Path(claim.read_text().strip())
        except FileNotFoundError:
            continue
        if holder.exists() and not holder.is_relative_to(root):
            found.add(claim.name)
    return found


def processes_of(root: Path) -> list[str]:
    """Processes other than this one whose command line names a path in ``root``."""
    return [
        f"process {pid}: {line}"
        for pid, line in command_lines().items()
        if f"{root}/" in line and pid not in {os.getpid(), os.getppid()}
    ]


def _tables() -> Iterator[str]:
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True)
    yield from (line for line in listed.stdout.splitlines() if "orkestr_" in line)


def _profiles() -> Iterator[str]:
    # One to a line, and its mode (securityfs of AppArmor); not there where it is off.
    with suppress(OSError):
        loaded = Path("/sys/kernel/security/apparmor/profiles").read_text().splitlines()
        yield from (f"profile {line}" for line in loaded if line.startswith("orkestr-"))


def mounts() -> list[Path]:
    """Where something is mounted, as this process sees it."""
    return mount_points(Path("/proc/self/mountinfo").read_text())


def loops() -> Iterator[Path]:
    """The files behind loop devices (loop(4))."""
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield Path(path.read_text().strip().removesuffix(" (deleted)"))


def instance_of(name: str) -> str:
    """The instance's number in a name of the host runtime's, or nothing."""
    found = re.search(r"(?:ork|orkestr[_-])(\d+)", name)
    return found[1] if found else ""
