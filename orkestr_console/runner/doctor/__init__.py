"""Checks of what this machine lacks, each with what to do about it.

What the kernel can do is tried, as a file or a version that promises it may not be true; nothing
of the machine is changed by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from orkestr_console.runner.doctor import (
    capacity,
    cgroups,
    keeping,
    kernel,
    machine,
    network,
    software,
)
from orkestr_console.runner.doctor.finding import Finding, needs_root
from orkestr_console.runner.doctor.network import listen_problem
from orkestr_console.runner.layout import Layout

__all__ = ["Finding", "examine", "listen_problem"]

Check = Callable[[Layout], Finding]

CHECKS_BEFORE_TRIALS: tuple[Check, ...] = (
    machine.check_root,
    kernel.check_architecture,
    kernel.check_kernel,
    kernel.check_modules,
    machine.check_state_directory,
    machine.check_writable,
    kernel.check_namespaces,
    kernel.check_limits,
)
CHECKS_AFTER_TRIALS: tuple[Check, ...] = (
    cgroups.check_cgroups,
    cgroups.check_delegation,
    software.check_programs,
    software.check_postgres,
    software.check_lxc_binding,
    software.check_subordinate_ids,
    software.check_apparmor,
    network.check_forwarding,
    network.check_firewalls,
    network.check_proxy,
    network.check_registries,
    network.check_port,
    network.check_previews,
    machine.check_disk,
    machine.check_memory,
    capacity.check_capacity,
    machine.check_clock,
    machine.check_tree,
    keeping.check_installation,
    keeping.check_quarantine,
)


def examine(layout: Layout) -> Iterator[Finding]:
    """Every check in turn; none of them changes the machine."""
    yield from (_run_check(check, layout) for check in CHECKS_BEFORE_TRIALS)
    yield from kernel.trial_findings(layout)
    yield from (_run_check(check, layout) for check in CHECKS_AFTER_TRIALS)


def _run_check(check: Check, layout: Layout) -> Finding:
    try:
        return check(layout)
    except PermissionError:
        return needs_root(check.__name__.removeprefix("check_").replace("_", " "))
