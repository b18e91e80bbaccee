"""The kernel's features, found by trials, and what may prevent them."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hostruntime.container.capacity import MAX_CONTAINERS, Room
from hostruntime.container.shared_limits import LowLimit, low_limits, max_processes
from hostruntime.container.trials import TRIALS
from hostruntime.errors import InvalidRequest
from hostruntime.network.squid_config import DESCRIPTORS
from orkestr_console.runner.doctor.finding import (
    Finding,
    existing_ancestor,
    is_root,
    needs_root,
    read_number,
)
from orkestr_console.runner.layout import Layout

OLDEST_KERNEL = (5, 19)
NEWER = f"boot Linux {'.'.join(map(str, OLDEST_KERNEL))} or later"
TRIED_ON = {"x86_64": "amd64", "aarch64": "arm64"}
MODULES = Path("/lib/modules")
SYSCTLS = Path("/proc/sys")
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
# Beside those of sandboxes, each of which takes one of each.
_SPARE_NAMESPACES = 128
# How many descriptors one process may ever have, which the proxy is started with.
_DESCRIPTORS = "fs/nr_open"
_SECONDS = 300

_STATE = "set ORKESTR_STATE_DIR to a directory on ext4, xfs or btrfs"
# What is well, and what to do where it is not, for each of hostruntime.container.trials.
_SUCCESSES = {
    "openat2": "paths are opened below a directory",
    "user namespaces": "made, as containers' are",
    "id-mapped mounts": "the state directory's file system takes them",
    "loop devices": "a file was mounted as a disk",
    "overlay": "a container's root was mounted and written to",
    "cgroup.kill": "a group's processes were killed at once",
    "setns": "a container's namespaces are entered by a pidfd",
    "network": "a pair of interfaces and a firewall were made",
}
_REMEDIES = {
    "openat2": NEWER,
    "user namespaces": "sysctl -w user.max_user_namespaces=15000; a kernel with CONFIG_USER_NS",
    "id-mapped mounts": f"{_STATE}; {NEWER}",
    "loop devices": "modprobe loop",
    "overlay": f"modprobe overlay; {_STATE}; {NEWER}",
    "cgroup.kill": f"{NEWER}, with cgroup v2 mounted",
    "setns": NEWER,
    "network": "modprobe -a veth nf_tables nft_ct; a kernel with NF_TABLES_INET and NFT_FIB_INET",
}


def check_kernel(_: Layout) -> Finding:
    """ID-mapped mounts of ext4 need Linux 5.12, and overlayfs over them 5.19."""
    release = os.uname().release
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if numbers >= OLDEST_KERNEL:
        return Finding("kernel", "ok", f"Linux {release} has overlayfs over id-mapped mounts")
    wanted = ".".join(map(str, OLDEST_KERNEL))
    return Finding("kernel", "fail", f"Linux {release} is older than {wanted}", NEWER)


def check_architecture(_: Layout) -> Finding:
    """The system-call filter supports only these architectures."""
    machine = platform.machine()
    if machine not in TRIED_ON:
        known = " or ".join(TRIED_ON)
        return Finding("architecture", "fail", f"{machine} is not known", f"use {known}")
    if sys.maxsize < 2**32:
        return Finding("architecture", "fail", "this Python is 32-bit", "use a 64-bit system")
    return Finding("architecture", "ok", TRIED_ON[machine])


def check_modules(_: Layout, modules: Path = MODULES) -> Finding:
    """Without its modules, the running kernel can use only what is already loaded."""
    release = os.uname().release
    if (modules / release).is_dir():
        return Finding("kernel modules", "ok", f"those of Linux {release} are installed")
    others = sorted(path.name for path in modules.glob("*")) if modules.is_dir() else []
    if not others:
        return Finding(
            "kernel modules", "ok", "none: what is needed is built in, or it fails below"
        )
    return Finding(
        "kernel modules",
        "warn",
        f"those of the running Linux {release} are gone; there are those of {', '.join(others)}",
        "reboot: the kernel was upgraded, and what is not loaded yet cannot be loaded any more",
    )


def trial_findings(layout: Layout) -> Iterator[Finding]:
    """One finding per trial (:mod:`hostruntime.container.trials`); they need root."""
    if not is_root():
        yield needs_root("kernel features")
        return
    answers = run_trials(existing_ancestor(layout.state_dir), layout.tree)
    modules = check_modules(layout)
    for name in TRIALS:
        error = answers.get(name, "the trial itself ended early")
        if error is None:
            yield Finding(name, "ok", _SUCCESSES[name])
        else:
            remedy = modules.remedy or _REMEDIES[name]
            yield Finding(name, "fail", " ".join(error.split()), remedy)


def run_trials(directory: Path, tree: Path) -> dict[str, str | None]:
    """Run the trials in a separate process; each one's error, or None."""
    argv = [sys.executable, "-m", "hostruntime.container.trials", str(directory)]
    result = subprocess.run(argv, cwd=tree, capture_output=True, timeout=_SECONDS)
    answers = (json.loads(line) for line in result.stdout.splitlines())
    return {answer["name"]: answer["error"] for answer in answers}


def check_namespaces(_: Layout, sysctls: Path = SYSCTLS) -> Finding:
    """Each sandbox needs a namespace of every kind; distributions restrict users, not root."""
    limits = {kind: read_number(sysctls / f"user/max_{kind}_namespaces") for kind in NAMESPACES}
    kind, least = min(limits.items(), key=lambda item: item[1])
    needed = _max_sandboxes() + _SPARE_NAMESPACES
    if least < needed:
        seen = f"user.max_{kind}_namespaces is {least}, and each of {needed} sandboxes takes one"
        remedy = f"sysctl -w user.max_{kind}_namespaces=15000"
        return Finding("namespaces", "warn" if least else "fail", seen, remedy)
    return Finding("namespaces", "ok", f"up to {least} of each kind{_restrictions(sysctls)}")


def _max_sandboxes() -> int:
    try:
        return Room.of_machine().containers
    except InvalidRequest:
        # Which capacity.check_capacity reports.
        return MAX_CONTAINERS


def _restrictions(sysctls: Path) -> str:
    # Ubuntu's (since 23.10) and Debian's own (off since Debian 11).
    restricted = {
        "apparmor_restrict_unprivileged_userns": "1",
        "unprivileged_userns_clone": "0",
    }
    set_here = [
        f"kernel.{name}={value}"
        for name, value in restricted.items()
        if (path := sysctls / "kernel" / name).exists() and path.read_text().strip() == value
    ]
    if not set_here:
        return ""
    return f"; {' and '.join(set_here)} does not matter, as the agent makes them as root"


def check_limits(_: Layout, sysctls: Path = SYSCTLS) -> Finding:
    """System-wide limits that sandboxes and the proxy would reach."""
    low, descriptors = low_limits(sysctls), read_number(sysctls / _DESCRIPTORS)
    read_only = is_read_only(sysctls)
    other_limits = []
    if descriptors < DESCRIPTORS:
        other_limits.append(LowLimit(_DESCRIPTORS, str(descriptors), str(DESCRIPTORS)))
    if other_limits or (low and read_only):
        wanted = [*(low if read_only else []), *other_limits]
        settings = " ".join(each.assignment for each in wanted)
        return Finding("limits", "warn", _values(wanted), f"sysctl -w {settings}")
    if low:
        return Finding("limits", "ok", f"{_values(low)}; the next start raises what is too low")
    process_limit = max_processes(sysctls)
    return Finding(
        "limits", "ok", f"all sandboxes together run up to {process_limit} processes and threads"
    )


def is_read_only(path: Path) -> bool:
    """Whether ``path`` is on a read-only mount, as /proc/sys is in a container."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _values(limits: list[LowLimit]) -> str:
    return ", ".join(f"{each.setting} is {each.value}" for each in limits)
