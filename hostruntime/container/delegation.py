"""The parent control group of containers, if systemd owns the cgroup tree.

On a systemd machine with cgroup v2 alone, groups may only be created below a unit that requests it
(``Delegate=``, systemd.resource-control(5); "Three Scenarios" in systemd's CGROUP_DELEGATION).
Each instance has such a unit, ``ork0.service`` in ``orkestr.slice``: systemd neither touches its
contents nor removes its controllers, and it belongs to no login session, so that logging out or
restarting the agent stops no container.  The unit runs one idle process, which keeps it alive;
stopping the unit kills every container, as a shutdown does.

Everywhere else the groups can simply be created, and this module does nothing.
"""

from __future__ import annotations

from pathlib import Path

from hostruntime.container.cgroups import CONTROLLERS, SLICE, CgroupLayout, cgroup_layout
from hostruntime.errors import HostError, HostUnavailable
from hostruntime.host.paths import Instance
from hostruntime.host.run import run

_SECONDS = 60.0
_KEEPER_GROUP = "keeper"
_PROPERTIES = (
    "Type=exec",
    "Delegate=yes",
    # An out-of-memory sandbox must not stop the others (the default stops the unit).
    "OOMPolicy=continue",
    "OOMScoreAdjust=-999",
    # The default is 15 % of the machine's maximum; limit_tasks sets ours.
    "TasksMax=infinity",
    # Tenants' processes must not delay a shutdown.
    "TimeoutStopSec=5",
)
# Prints the controllers of the group that it runs in (cgroups(7)).
_PRINT_CONTROLLERS = 'cat "/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/cgroup.controllers"'


def set_up(instance: Instance) -> None:
    """Create the parent group of this instance's containers; idempotent.

    Raises HostUnavailable if systemd does not provide it, or a controller is missing.
    """
    layout = cgroup_layout()
    if not layout.delegated:
        return
    group = _group(layout, instance)
    try:
        if not group.is_dir():
            _start(instance)
        _move_processes_aside(group)
    except (HostError, OSError) as error:
        raise HostUnavailable(
            f"systemd does not give this agent a control group for its containers ({group}): "
            f"{error}. `systemctl status {_unit(instance)}` says more; the kernel needs the "
            f"controllers {', '.join(CONTROLLERS)} (see `cgroup_disable` in /proc/cmdline)."
        ) from error


def limit_tasks(instance: Instance, maximum: int) -> None:
    """Limit the processes and threads of all containers of an instance.  Raises HostError.

    Set through systemd, which would otherwise restore its own number when it reloads.
    """
    argv = ["systemctl", "set-property", "--runtime", _unit(instance), f"TasksMax={maximum}"]
    run(argv, timeout=_SECONDS)


def tear_down(instance: Instance) -> None:
    """Remove the group once no container is in it; idempotent.  Raises HostError."""
    layout = cgroup_layout()
    if not layout.delegated:
        return
    if _group(layout, instance).is_dir():
        run(["systemctl", "stop", _unit(instance)], timeout=_SECONDS)
    # All instances share the slice.
    if not any((layout.unified / SLICE).glob("*.service")):
        run(["systemctl", "stop", SLICE], timeout=_SECONDS, check=False)


def _unit(instance: Instance) -> str:
    return Path(cgroup_layout().instance_group(instance.prefix)).name


def _group(layout: CgroupLayout, instance: Instance) -> Path:
    return layout.unified / layout.instance_group(instance.prefix)


def _start(instance: Instance) -> None:
    argv = ["systemd-run", "--quiet", "--collect", f"--unit={_unit(instance)}", f"--slice={SLICE}"]
    argv += [f"--description=Sandboxes of Orkestr Console, instance {instance.index}"]
    argv += [f"--property={each}" for each in _PROPERTIES]
    # A unit that was stopped a moment ago may still be stopping.
    run(["systemctl", "stop", _unit(instance)], timeout=_SECONDS, check=False)
    run([*argv, "catatonit", "-P"], timeout=_SECONDS)


def _move_processes_aside(group: Path) -> None:
    """Move processes out of a delegated group, so that containers can be created in it.

    See "No Internal Process Constraint" in the kernel's cgroup-v2.rst.
    """
    keeper = group / _KEEPER_GROUP
    keeper.mkdir(exist_ok=True)
    for pid in (group / "cgroup.procs").read_text().split():
        (keeper / "cgroup.procs").write_text(pid)
    (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))


def check() -> None:
    """Test whether systemd can run a unit like ours.  Raises HostUnavailable.

    Does nothing if no delegation is needed.
    """
    if cgroup_layout().delegated:
        _check_unit()


def _check_unit() -> None:
    argv = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe"]
    argv += [f"--property={each}" for each in _PROPERTIES]
    try:
        delegated = run([*argv, "sh", "-c", _PRINT_CONTROLLERS], timeout=_SECONDS).text.split()
    except HostError as error:
        raise HostUnavailable(
            f"systemd does not run a unit of ours: {error.detail} See `systemctl status`, and "
            "that dbus is installed and runs."
        ) from error
    if missing := [name for name in CONTROLLERS if name not in delegated]:
        raise HostUnavailable(
            f"systemd delegates no {' or '.join(missing)} controller: look for cgroup_disable in "
            "/proc/cmdline, take it out of the boot loader's configuration, and reboot."
        )
