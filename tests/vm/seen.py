"""What is on a machine, seen from outside the product: runs as root in the guest, answers JSON.

``python -m tests.vm.seen leftovers DIRECTORY``
    everything that an installation in DIRECTORY has on the machine
``python -m tests.vm.seen container SANDBOX``
    how the kernel holds a running sandbox: its init's label, filter and groups, and their limits
``python -m tests.vm.seen mover SANDBOX``
    the same of a process that moves files in or out of it, once there is one
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.leftovers import leftovers

TITLE = b"orkestr hostruntime"
MOVER_SECONDS = 60.0
GROUPS = Path("/sys/fs/cgroup")
PROFILES = Path("/sys/kernel/security/apparmor/profiles")
_OURS = re.compile(r"\b(orkestr|ork\d|lxc-ork)")
_GROUP = re.compile(r"(?:^|\.)ork")
_LIMITS = ("memory.max", "memory.swap.max", "pids.max", "cpu.max")
_COUNTS = ("memory.events", "cpu.stat", "cgroup.procs")


def everything(directory: Path) -> list[str]:
    """Processes, mounts, loop devices, names in the network, groups, profiles and units."""
    groups = [f"cgroup {path}" for path in GROUPS.rglob("*") if _GROUP.search(path.name)]
    return sorted({*leftovers(directory), *groups, *_profiles(), *_units(), *_caches()})


def _profiles() -> list[str]:
    if not PROFILES.exists():
        return []
    return [f"profile {line}" for line in PROFILES.read_text().splitlines() if _OURS.search(line)]


def _units() -> list[str]:
    listed = subprocess.run(
        ["systemctl", "list-units", "--all", "--no-legend", "--plain"],
        capture_output=True,
        text=True,
        check=True,
    )
    names = [line.split()[0] for line in listed.stdout.splitlines() if line.strip()]
    # Mounts and devices of ours have units as well; those are listed as what they are.
    return [f"unit {name}" for name in names if _OURS.match(name)]


def _caches() -> list[str]:
    return [f"cache {path}" for path in Path("/var/cache/lxc").rglob("*ork*")]


def container(sandbox: str) -> dict[str, Any]:
    """The init of a sandbox as /proc and its group show it. Raises LookupError."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            group = (entry / "cgroup").read_text()
            status = (entry / "status").read_text()
        except OSError:
            continue
        if sandbox in group and re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
            return _described(entry, group.strip(), status)
    raise LookupError(f"no init of {sandbox}")


def mover(sandbox: str) -> dict[str, Any]:
    """What moves files of a sandbox, as soon as there is such a process. Raises LookupError."""
    until = time.monotonic() + MOVER_SECONDS
    while time.monotonic() < until:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                group, status = (entry / "cgroup").read_text(), (entry / "status").read_text()
                # A copy of its launcher, whose title it has.
                if sandbox in group and (entry / "cmdline").read_bytes().startswith(TITLE):
                    return _described(entry, group.strip(), status)
            except OSError:
                continue
    raise LookupError(f"nothing moves files of {sandbox}")


def _described(entry: Path, group: str, status: str) -> dict[str, Any]:
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    place = GROUPS / group.rpartition(":")[2].lstrip("/")
    # LXC or we may have put init into a group below the one that has the limits.
    holder = next(
        (at for at in (place, *place.parents) if _limit(at, "memory.max") != "max"), place
    )
    return {
        "pid": int(entry.name),
        "cgroup": group,
        "label": (entry / "attr/current").read_text().strip("\0\n"),
        "seccomp": fields.get("Seccomp", "?").strip(),
        "holder": str(holder),
        "limits": {name: _limit(holder, name) for name in _LIMITS},
        "counts": {name: _limit(holder, name) for name in _COUNTS},
    }


def _limit(group: Path, name: str) -> str:
    try:
        return (group / name).read_text().strip()
    except OSError:
        return "max" if name == "memory.max" else "absent"


def main(arguments: list[str]) -> None:
    question, subject = arguments
    answers: dict[str, Callable[[], object]] = {
        "leftovers": lambda: everything(Path(subject)),
        "container": lambda: container(subject),
        "mover": lambda: mover(subject),
    }
    sys.stdout.write(json.dumps(answers[question]()))


if __name__ == "__main__":
    main(sys.argv[1:])
