"""Control groups: the hierarchies, and whether systemd delegates a part of its tree."""

from __future__ import annotations

from pathlib import Path

from hostruntime.container import delegation
from hostruntime.container.cgroups import CGROUPS, CONTROLLERS, SYSTEMD
from hostruntime.errors import HostError
from orkestr_console.runner.doctor.finding import Finding, is_root, needs_root
from orkestr_console.runner.layout import Layout


def check_cgroups(_: Layout, root: Path = CGROUPS) -> Finding:
    """Limits and killing process trees need cgroups, including cgroup2."""
    if (root / "cgroup.controllers").exists():
        controllers = (root / "cgroup.controllers").read_text().split()
        if missing := [name for name in CONTROLLERS if name not in controllers]:
            remedy = (
                "enable them at boot: no cgroup_disable in the kernel's command line, on a "
                "Raspberry Pi also cgroup_enable=memory; nor a v1 hierarchy that has them"
            )
            return Finding("cgroups", "fail", f"v2 without {', '.join(missing)}", remedy)
        return Finding("cgroups", "ok", "v2 (unified)")
    if not (root / "unified/cgroup.procs").exists():
        remedy = "boot with systemd.unified_cgroup_hierarchy=1"
        return Finding("cgroups", "fail", "no cgroup2 hierarchy is mounted", remedy)
    if missing := [name for name in CONTROLLERS if not (root / name).is_dir()]:
        seen = f"hybrid, without v1's {', '.join(missing)}"
        return Finding("cgroups", "fail", seen, "boot with systemd.unified_cgroup_hierarchy=1")
    return Finding("cgroups", "ok", "hybrid: limits by v1, process trees by v2")


def check_delegation(_: Layout, systemd: Path = SYSTEMD, root: Path = CGROUPS) -> Finding:
    """Where systemd owns the tree, the containers' groups are in a unit of our own."""
    if not systemd.is_dir():
        return Finding("delegation", "ok", "not needed: systemd does not run this machine")
    if not (root / "cgroup.controllers").exists():
        return Finding("delegation", "ok", "not needed: limits are not in systemd's tree")
    if not is_root():
        return needs_root("delegation")
    try:
        delegation.check()
    except HostError as error:
        remedy = "apt-get install systemd dbus, and `systemctl status` must answer"
        return Finding("delegation", "fail", " ".join(error.detail.split()), remedy)
    return Finding("delegation", "ok", "systemd gives the agent a group of its own")
