"""What this machine lacks, in plain words: each check names what to do about it."""

from __future__ import annotations

import ctypes.util
import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hostruntime.egress import host_registries, proxy_obstacles
from hostruntime.paths import ID_BASE, ID_COUNT, StatePaths
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import holder

Verdict = Literal["ok", "warn", "fail"]

GIB = 1024**3
BASES_NEED = 4 * GIB
OLDEST_KERNEL = (5, 19)
PROGRAMS = {
    "lxc-start": "lxc",
    "newuidmap": "uidmap",
    "mmdebstrap": "mmdebstrap",
    "squid": "squid-openssl",
    "nft": "nftables",
    "ip": "iproute2",
    "catatonit": "catatonit",
    "mke2fs": "e2fsprogs",
    "setpriv": "util-linux",
    "gcc": "gcc",
}


@dataclass(frozen=True)
class Finding:
    """One check's verdict, what was seen, and what to do unless all is well."""

    name: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def examine(layout: Layout) -> Iterator[Finding]:
    """Every check in turn; none of them changes the machine."""
    checks: tuple[Callable[[Layout], Finding], ...] = (
        check_root,
        check_kernel,
        check_overlay,
        check_loop_devices,
        check_user_namespaces,
        check_network_namespaces,
        check_cgroups,
        check_programs,
        check_postgres,
        check_lxc_binding,
        check_subordinate_ids,
        check_forwarding,
        check_forward_policy,
        check_apparmor,
        check_proxy,
        check_registries,
        check_disk,
        check_memory,
        check_port,
        check_tree,
    )
    for check in checks:
        yield check(layout)


def check_root(_: Layout) -> Finding:
    """Everything that touches containers, mounts and the network needs root."""
    if os.geteuid() == 0:
        return Finding("root", "ok", "running as root")
    return Finding(
        "root", "warn", "not root: some checks below see less", "run it as root, or with sudo"
    )


def check_kernel(_: Layout) -> Finding:
    """ID-mapped mounts of ext4 need Linux 5.12, and overlayfs over them 5.19."""
    release = os.uname().release
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if numbers >= OLDEST_KERNEL:
        return Finding("kernel", "ok", f"Linux {release} has overlayfs over id-mapped mounts")
    wanted = ".".join(map(str, OLDEST_KERNEL))
    return Finding(
        "kernel", "fail", f"Linux {release} is older than {wanted}", "boot a newer kernel"
    )


def check_overlay(layout: Layout) -> Finding:
    """Overlayfs, and a filesystem below the state directory that can carry it."""
    known = Path("/proc/filesystems").read_text()
    if "\toverlay" not in known and shutil.which("modprobe"):
        subprocess.run(["modprobe", "overlay"], capture_output=True)
        known = Path("/proc/filesystems").read_text()
    if "\toverlay" not in known:
        return Finding("overlay", "fail", "the kernel has no overlayfs", "modprobe overlay")
    below = filesystem_of(layout.state_dir)
    if below in {"overlay", "nfs", "nfs4", "tmpfs", "9p", "fuse", "vfat"}:
        return Finding(
            "overlay",
            "fail",
            f"{layout.state_dir} is on {below}, which cannot carry sandboxes",
            "set ORKESTR_STATE_DIR to a directory on ext4, xfs or btrfs",
        )
    return Finding("overlay", "ok", f"overlayfs, over {below} at {layout.state_dir}")


def check_loop_devices(_: Layout) -> Finding:
    """Each container's disk is a file, mounted through a loop device."""
    control = Path("/dev/loop-control")
    if not control.exists() and shutil.which("modprobe"):
        subprocess.run(["modprobe", "loop"], capture_output=True)
    if control.exists():
        return Finding("loop devices", "ok", "as many as are asked for")
    return Finding("loop devices", "fail", f"there is no {control}", "modprobe loop")


def check_user_namespaces(_: Layout) -> Finding:
    """Containers are unprivileged: each lives in a user namespace."""
    limit = read_number(Path("/proc/sys/user/max_user_namespaces"))
    if limit:
        return Finding("user namespaces", "ok", f"up to {limit}")
    remedy = "sysctl -w user.max_user_namespaces=15000, and a kernel with CONFIG_USER_NS"
    return Finding("user namespaces", "fail", "the kernel allows none", remedy)


def check_network_namespaces(_: Layout) -> Finding:
    """Each sandbox has a network namespace of its own."""
    limit = read_number(Path("/proc/sys/user/max_net_namespaces"))
    if limit and Path("/proc/self/ns/net").exists():
        return Finding("net namespaces", "ok", f"up to {limit}")
    return Finding(
        "net namespaces", "fail", "the kernel allows none", "sysctl -w user.max_net_namespaces=4096"
    )


def check_cgroups(_: Layout) -> Finding:
    """Limits and the killing of whole process trees need cgroups, cgroup2 among them."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
        missing = {"cpu", "memory", "pids"} - set(controllers)
        if missing:
            names = ", ".join(sorted(missing))
            return Finding("cgroups", "fail", f"v2 without {names}", "enable them at boot")
        return Finding("cgroups", "ok", "v2 (unified)")
    if Path("/sys/fs/cgroup/unified/cgroup.procs").exists():
        return Finding("cgroups", "ok", "hybrid: limits by v1, process trees by v2")
    return Finding(
        "cgroups", "fail", "no cgroup2 hierarchy is mounted", "mount -t cgroup2 none /sys/fs/cgroup"
    )


def check_programs(_: Layout) -> Finding:
    """The programs of other packages that the host agent runs."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = {package for name, package in PROGRAMS.items() if not shutil.which(name, path=path)}
    if missing:
        packages = " ".join(sorted(missing))
        remedy = f"apt-get install {packages} (make run does it)"
        return Finding("packages", "fail", f"missing: {packages}", remedy)
    return Finding("packages", "ok", f"all {len(PROGRAMS)} programs found")


def check_postgres(layout: Layout) -> Finding:
    """A server for the private cluster, unless DATABASE_URL names one."""
    if layout.database_url:
        return Finding("postgresql", "ok", "DATABASE_URL names one")
    servers = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if servers:
        versions = ", ".join(server.parents[1].name for server in servers)
        return Finding("postgresql", "ok", f"server {versions} installed")
    remedy = "apt-get install postgresql (make run does it), or set DATABASE_URL"
    return Finding("postgresql", "fail", "no server is installed", remedy)


def check_lxc_binding(_: Layout) -> Finding:
    """liblxc and the binding in this virtual environment that was built for it."""
    library = ctypes.util.find_library("lxc")
    tried = subprocess.run(
        [sys.executable, "-c", "import _lxc; print(_lxc.get_version())"],
        capture_output=True,
        text=True,
    )
    if library and tried.returncode == 0:
        return Finding("lxc", "ok", f"liblxc {tried.stdout.strip()} and its Python binding")
    seen = tried.stderr.strip().splitlines()[-1:] or ["liblxc is not installed"]
    return Finding("lxc", "fail", seen[0], "apt-get install lxc lxc-dev; rm -rf .venv; make run")


def check_subordinate_ids(_: Layout) -> Finding:
    """Root must own the host ids that containers use (subuid(5)); the agent adds its line."""
    overlapping = []
    for name in ("/etc/subuid", "/etc/subgid"):
        path = Path(name)
        for line in path.read_text().splitlines() if path.exists() else []:
            owner, start, count = (*line.split(":"), "", "")[:3]
            if not (start.isdecimal() and count.isdecimal()) or owner in {"root", "0"}:
                continue
            if int(start) < ID_BASE + ID_COUNT and int(start) + int(count) > ID_BASE:
                overlapping.append(f"{name}: {line}")
    if overlapping:
        remedy = "move that user's range elsewhere: sandboxes would share ids with it"
        return Finding("subordinate ids", "fail", "; ".join(overlapping), remedy)
    return Finding("subordinate ids", "ok", f"{ID_BASE} to {ID_BASE + ID_COUNT - 1} are free")


def check_forwarding(_: Layout) -> Finding:
    """Sandboxes with an open network are routed; the agent turns forwarding on if it is off."""
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    if read_number(switch) == 1:
        return Finding("ip_forward", "ok", "on")
    if os.access(switch, os.W_OK):
        return Finding("ip_forward", "ok", "off; the agent turns it on")
    remedy = "sysctl -w net.ipv4.ip_forward=1"
    return Finding("ip_forward", "warn", "off, and may not be turned on", remedy)


def check_forward_policy(_: Layout) -> Finding:
    """Docker and ufw drop what is forwarded: only the open network minds, others use the proxy."""
    nft = shutil.which("nft", path="/usr/sbin:/sbin:/usr/bin")
    if nft is None or os.geteuid() != 0:
        return Finding("forward policy", "warn", "cannot be seen (nft as root)", "run as root")
    rules = subprocess.run([nft, "list", "chains"], capture_output=True, text=True)
    table = ""
    for line in rules.stdout.splitlines():
        if line.startswith("table"):
            table = line.removeprefix("table ").removesuffix(" {")
        elif "hook forward" in line and "policy drop" in line and "orkestr_" not in table:
            remedy = "allow it, e.g.: nft insert rule {} FORWARD iifname 'ork*' accept"
            seen = f"table {table} drops forwarded traffic: open networks will not reach out"
            return Finding("forward policy", "warn", seen, remedy.format(table))
    return Finding("forward policy", "ok", "nothing on this machine drops forwarded traffic")


def check_apparmor(_: Layout) -> Finding:
    """Where the kernel has AppArmor, LXC makes each container a profile and has it loaded."""
    if not Path("/sys/kernel/security/apparmor").is_dir():
        return Finding("apparmor", "ok", "this kernel does not use it")
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if shutil.which("apparmor_parser", path=path):
        return Finding("apparmor", "ok", "profiles can be loaded")
    remedy = "apt-get install apparmor (make run does it)"
    return Finding("apparmor", "fail", "apparmor_parser is missing: no container starts", remedy)


def check_proxy(_: Layout) -> Finding:
    """Squid, as the egress proxy needs it."""
    obstacles = proxy_obstacles()
    if not obstacles:
        return Finding("egress proxy", "ok", "Squid can be run")
    remedy = "; ".join(obstacles[1:]) or "apt-get install squid-openssl (make run does it)"
    return Finding("egress proxy", "fail", obstacles[0], remedy)


def check_registries(layout: Layout) -> Finding:
    """What pip, npm and apt of this machine say is what sandboxes reach by default."""
    paths = StatePaths(layout.state_dir)
    notes = host_registries(paths).notes
    if not notes:
        return Finding("registries", "ok", "pip, npm and apt say where they fetch from")
    remedy = "sandboxes on network restricted do without what is named here"
    return Finding("registries", "warn", "; ".join(notes), remedy)


def check_disk(layout: Layout) -> Finding:
    """Base images take about 2 GB, and every template its own changes."""
    free = shutil.disk_usage(existing(layout.state_dir)).free
    seen = f"{free / GIB:.1f} GiB free at {layout.state_dir}"
    if free >= BASES_NEED:
        return Finding("disk space", "ok", seen)
    remedy = "free some, or set ORKESTR_STATE_DIR to a larger disk"
    return Finding("disk space", "fail" if free < GIB else "warn", seen, remedy)


def check_memory(_: Layout) -> Finding:
    """A small sandbox may use 1 GiB, and the console itself some 400 MiB."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) * 1024 if found else 0
    seen = f"{free / GIB:.1f} GiB available"
    if free >= 2 * GIB:
        return Finding("memory", "ok", seen)
    return Finding("memory", "warn", seen, "have 2 GiB or more, or run few sandboxes at a time")


def check_port(layout: Layout) -> Finding:
    """The console's port; it is no fault if this very installation serves on it."""
    if holder(layout) is not None:
        return Finding("port", "ok", f"{layout.port}: this console serves on it")
    if port_is_free(layout.port):
        return Finding("port", "ok", f"{layout.port} is free")
    remedy = f"choose another: make run PORT={layout.port + 1}"
    return Finding("port", "fail", f"{layout.port} is in use by another program", remedy)


def check_tree(layout: Layout) -> Finding:
    """Web and worker run as a user of their own, who must be able to read the clone."""
    if layout.tree.stat().st_mode & 0o005 == 0o005:
        return Finding("tree", "ok", f"{layout.tree} is readable by the orkestr user")
    remedy = f"chmod -R go+rX {layout.tree}"
    return Finding("tree", "warn", f"{layout.tree} is closed to the orkestr user", remedy)


def port_is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` of every address now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno not in {errno.EADDRINUSE, errno.EACCES}
    return True


def existing(path: Path) -> Path:
    """``path``, or the nearest directory above it that exists."""
    return path if path.exists() else existing(path.parent)


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that ``path`` is or would be on (proc(5), mountinfo)."""
    device = existing(path).stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return "an unknown filesystem"


def read_number(path: Path) -> int:
    """The number a sysctl file holds; 0 when there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
