"""A control group to put containers in, where systemd owns the tree.

On a machine that systemd runs with cgroup v2 alone, groups may be made only below a unit that asks
for it (``Delegate=``, systemd.resource-control(5); "Three Scenarios" in systemd's
CGROUP_DELEGATION).  Each instance has such a unit, ``ork0.service`` in ``orkestr.slice``: systemd
neither touches what is in it nor takes its controllers away, and it belongs to nobody's session, so
that logging out or restarting the agent ends no container.  What the unit runs is one process that
does nothing, to keep it; stopping the unit ends every container, as a shutdown does.

Everywhere else the groups are simply made, and there is nothing to do here.
"""

from __future__ import annotations

from pathlib import Path

from hostruntime.container.cgroups import CONTROLLERS, SLICE, CgroupLayout, cgroup_layout
from hostruntime.errors import HostError, HostUnavailable
from hostruntime.host.paths import Instance
from hostruntime.host.run import run

_SECONDS = 60.0
_KEEPER = "keeper"
_PROPERTIES = (
    "Type=exec",
    "Delegate=yes",
    # A sandbox that is out of memory is no reason to stop the others (the default stops the unit).
    "OOMPolicy=continue",
    "OOMScoreAdjust=-999",
    # The default is 15 % of what the machine may run; see limit_tasks for ours.
    "TasksMax=infinity",
    # At a shutdown: what tenants run gets no say in how long it takes.
    "TimeoutStopSec=5",
)
# Which controllers the group has that this runs in (cgroups(7)).
_SAY_CONTROLLERS = 'cat "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.controllers"'


def set_up(instance: Instance) -> None:
    """Have the group that this instance's containers go into; idempotent.

    Raises HostUnavailable when systemd does not give it, or lacks a controller.
    """
    layout = cgroup_layout()
    if not layout.delegated:
        return
    group = _group(layout, instance)
    try:
        if not group.is_dir():
            _start(instance)
        _make_room(group)
    except (HostError, OSError) as error:
        raise HostUnavailable(
            f"systemd does not give this agent a control group for its containers ({group}): "
            f"{error}. `systemctl status {_unit(instance)}` says more; the kernel needs the "
            f"controllers {', '.join(CONTROLLERS)} (see `cgroup_disable` in /proc/cmdline)."
        ) from error


def limit_tasks(instance: Instance, most: int) -> None:
    """Let all of an instance's containers have so many processes and threads.  Raises HostError.

    Told to systemd, which would otherwise put its own number back when it reloads.
    """
    words = ["systemctl", "set-property", "--runtime", _unit(instance), f"TasksMax={most}"]
    run(words, timeout=_SECONDS)


def tear_down(instance: Instance) -> None:
    """Give the group back once no container is in it; idempotent.  Raises HostError."""
    layout = cgroup_layout()
    if not layout.delegated:
        return
    if _group(layout, instance).is_dir():
        run(["systemctl", "stop", _unit(instance)], timeout=_SECONDS)
    # The slice is every instance's.
    if not any((layout.unified / SLICE).glob("*.service")):
        run(["systemctl", "stop", SLICE], timeout=_SECONDS, check=False)


def _unit(instance: Instance) -> str:
    return Path(cgroup_layout().instance_group(instance.prefix)).name


def _group(layout: CgroupLayout, instance: Instance) -> Path:
    return layout.unified / layout.instance_group(instance.prefix)


def _start(instance: Instance) -> None:
    words = ["systemd-run", "--quiet", "--collect", f"--unit={_unit(instance)}", f"--slice={SLICE}"]
    words += [f"--description=Sandboxes of Orkestr Console, instance {instance.index}"]
    words += [f"--property={each}" for each in _PROPERTIES]
    # One that was stopped a moment ago may still be on its way out.
    run(["systemctl", "stop", _unit(instance)], timeout=_SECONDS, check=False)
    run([*words, "catatonit", "-P"], timeout=_SECONDS)


def _make_room(group: Path) -> None:
    """Let containers be made in a delegated group: no process may be beside them.

    "No Internal Process Constraint" in the kernel's cgroup-v2.rst.
    """
    keeper = group / _KEEPER
    keeper.mkdir(exist_ok=True)
    for pid in (group / "cgroup.procs").read_text().split():
        (keeper / "cgroup.procs").write_text(pid)
    (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))


def check() -> None:
    """Have systemd run a unit like ours for a moment.  Raises HostUnavailable.

    Where there is nothing to be delegated, all is well.
    """
    if cgroup_layout().delegated:
        _check_unit()


def _check_unit() -> None:
    words = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe"]
    words += [f"--property={each}" for each in _PROPERTIES]
    try:
        given = run([*words, "sh", "-c", _SAY_CONTROLLERS], timeout=_SECONDS).text.split()
    except HostError as error:
        raise HostUnavailable(
            f"systemd does not run a unit of ours: {error.detail} See `systemctl status`, and "
            "that dbus is installed and runs."
        ) from error
    if missing := [name for name in CONTROLLERS if name not in given]:
        raise HostUnavailable(
            f"systemd delegates no {' or '.join(missing)} controller: look for cgroup_disable in "
            "/proc/cmdline, take it out of the boot loader's configuration, and reboot."
        )
