"""The programs, libraries and subordinate ids that the runtime needs."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hostruntime.container import apparmor
from hostruntime.errors import HostError
from hostruntime.host.ids import ID_BASE, ID_COUNT
from orkestr_console.runner.doctor.finding import Finding, is_root, needs_root
from orkestr_console.runner.layout import Layout

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
# A name that no profile has: asking for it shows whether the kernel's list can be read.
_NO_PROFILE = "orkestr-none"


def check_programs(_: Layout) -> Finding:
    """The external programs that the host agent runs."""
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
    """liblxc, and this virtual environment's binding for it."""
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
    """Root must own the host ids of containers (subuid(5)); the agent adds its line."""
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


def check_apparmor(_: Layout) -> Finding:
    """Where the kernel has AppArmor, the sandboxes' profile must be loadable."""
    if not apparmor.enabled():
        return Finding("apparmor", "ok", "this kernel does not use it")
    if not is_root():
        return needs_root("apparmor")
    try:
        apparmor.check()
        apparmor.is_loaded(_NO_PROFILE)
    except HostError as error:
        remedy = "apt-get install apparmor (make run does it); else boot with apparmor=0"
        return Finding("apparmor", "fail", " ".join(error.detail.split()), remedy)
    return Finding("apparmor", "ok", "the parser takes the profile of sandboxes")
