"""What a test run may leave on the host: nothing. Seen from outside, not asked of our own code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from orkestr_console.runner.confine import mount_points

CLAIMS = Path("/run/orkestr/instances")
CGROUPS = Path("/sys/fs/cgroup")


def leftovers(root: Path, before: frozenset[str] = frozenset()) -> list[str]:
    """All on the host that belongs to a run in ``root``, from processes to loop devices.

    Names of the host runtime count when they were not in ``before`` and no living installation
    elsewhere has claimed their instance number.
    """
    foreign = foreign_instances(root)
    named = [name for name in host_names() if name not in before and _instance(name) not in foreign]
    mounts = [f"mount {path}" for path in _mounts() if path.is_relative_to(root)]
    loops = [f"loop device on {path}" for path in _loops() if path.is_relative_to(root)]
    return [*named, *mounts, *loops, *processes_of(root)]


def host_names() -> frozenset[str]:
    """Every link, network namespace, nft table and cgroup named the way the host runtime names."""
    links = (f"link {path.name}" for path in Path("/sys/class/net").glob("ork*"))
    spaces = (f"netns {path.name}" for path in Path("/run/netns").glob("ork*"))
    cgroups = (
        f"cgroup {path}"
        for pattern in ("ork*", "*/ork*", "*/lxc.payload.ork*", "lxc.payload.ork*")
        for path in CGROUPS.glob(pattern)
    )
    return frozenset([*links, *spaces, *cgroups, *_tables()])


def foreign_instances(root: Path) -> set[str]:
    """Instance numbers claimed by state directories that exist outside ``root``."""
    found = set()
    for claim in CLAIMS.glob("[0-9]*"):
        holder = Path(claim.read_text().strip())
        if holder.exists() and not holder.is_relative_to(root):
            found.add(claim.name)
    return found


def processes_of(root: Path) -> list[str]:
    """Processes other than this one whose command line names a path in ``root``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if f"{root}/" in line and int(entry.parent.name) not in {os.getpid(), os.getppid()}:
            found.append(f"process {entry.parent.name}: {line}")
    return found


def _tables() -> Iterator[str]:
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True)
    yield from (line for line in listed.stdout.splitlines() if "orkestr_" in line)


def _mounts() -> list[Path]:
    return mount_points(Path("/proc/self/mountinfo").read_text())


def _loops() -> Iterator[Path]:
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            yield Path(path.read_text().strip().removesuffix(" (deleted)"))


def _instance(name: str) -> str:
    found = re.search(r"(?:ork|orkestr_)(\d+)", name)
    return found[1] if found else ""
