"""The machine itself: privileges, directories, disk, memory and clock."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from hostruntime.host.disk_space import DiskSpace, Level
from hostruntime.host.kernel import mount_points_under
from orkestr_console.runner.doctor.finding import AS_ROOT, Finding, existing_ancestor, is_root
from orkestr_console.runner.layout import Layout

GIB = 1024**3
BASES_BYTES = 3 * GIB
# Their lower layers cannot be id-mapped, or they cannot be an overlay's at all.
UNSUITABLE_FILESYSTEMS = frozenset({"overlay", "nfs", "nfs4", "tmpfs", "9p", "fuse", "vfat"})
# What is written when software is installed; an installed machine is younger than neither.
REFERENCE_FILES = (Path("/var/lib/dpkg/status"), Path(__file__))
_DAY = 86_400.0


def check_root(_: Layout) -> Finding:
    """Everything that touches containers, mounts and the network needs root."""
    if is_root():
        return Finding("root", "ok", "running as root")
    return Finding("root", "warn", "not root: some checks below see less", AS_ROOT)


def check_state_directory(layout: Layout) -> Finding:
    """Images here are executed, and are the lower layers of containers' roots."""
    name, place = "state directory", existing_ancestor(layout.state_dir)
    kind, flags = filesystem_of(place), os.statvfs(place).f_flag
    elsewhere = "set ORKESTR_STATE_DIR to a directory on ext4, xfs or btrfs"
    if kind in UNSUITABLE_FILESYSTEMS:
        seen = f"{layout.state_dir} is on {kind}, which cannot carry sandboxes"
        return Finding(name, "fail", seen, elsewhere)
    for flag, word, option in (
        (os.ST_RDONLY, "read-only", "rw"),
        (os.ST_NOEXEC, "mounted noexec, and bases are run in it as they are made", "exec"),
    ):
        if flags & flag:
            remedy = f"mount -o remount,{option} {mount_point(place)}, or {elsewhere}"
            return Finding(name, "fail", f"{layout.state_dir} is {word}", remedy)
    return Finding(name, "ok", f"{layout.state_dir} is on {kind}")


def check_writable(layout: Layout, run: Path = Path("/run")) -> Finding:
    """The other writable directories (noexec, nosuid and nodev are harmless there)."""
    for place in (run, existing_ancestor(layout.var), Path("/etc"), Path("/tmp")):
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            remedy = f"mount -o remount,rw {mount_point(place)}"
            return Finding("writable", "fail", f"{place} is read-only", remedy)
    return Finding("writable", "ok", f"{run}, /etc, /tmp and {layout.var}")


def check_disk(layout: Layout) -> Finding:
    """Base images need about 2 GB, and templates their changes, in addition to the reserve."""
    room = DiskSpace.of(existing_ancestor(layout.state_dir))
    reserved = f"{room.reserve_bytes / GIB:.1f} GiB are reserved"
    seen = f"{room.free_bytes / GIB:.1f} GiB free at {layout.state_dir}, of which {reserved}"
    if room.files and room.free_files < 2 * room.reserve_files:
        seen += f"; {room.free_files} inodes free"
    if room.level is Level.NORMAL and room.free_bytes - room.reserve_bytes >= BASES_BYTES:
        return Finding("disk space", "ok", seen)
    remedy = "free some, set ORKESTR_STATE_DIR to a larger disk, or ORKESTR_RESERVE_GIB to less"
    return Finding("disk space", "warn" if room.level is Level.NORMAL else "fail", seen, remedy)


def check_memory(_: Layout) -> Finding:
    """A small sandbox may use 1 GiB, and the console itself some 400 MiB."""
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(match[1]) * 1024 if match else 0
    seen = f"{free / GIB:.1f} GiB available"
    if free >= 2 * GIB:
        return Finding("memory", "ok", seen)
    return Finding("memory", "warn", seen, "have 2 GiB or more, or run few sandboxes at a time")


def check_clock(_: Layout, reference_files: Iterable[Path] = REFERENCE_FILES) -> Finding:
    """A clock that is behind makes every certificate and package list invalid."""
    newest = max((path.stat().st_mtime for path in reference_files if path.exists()), default=0.0)
    now = time.time()
    today = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now))
    if now > newest - _DAY:
        return Finding("clock", "ok", f"{today} UTC")
    behind = time.strftime("%Y-%m-%d", time.gmtime(newest))
    seen = f"{today} UTC, though files here were written on {behind}: HTTPS and apt will fail"
    return Finding("clock", "fail", seen, "timedatectl set-ntp true, or set it with date --set")


def check_tree(layout: Layout) -> Finding:
    """Web and worker run as their own user, who must be able to read the clone."""
    if layout.tree.stat().st_mode & 0o005 == 0o005:
        return Finding("tree", "ok", f"{layout.tree} is readable by the orkestr user")
    remedy = f"chmod -R go+rX {layout.tree}"
    return Finding("tree", "warn", f"{layout.tree} is closed to the orkestr user", remedy)


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that ``path`` is or would be on (proc(5), mountinfo)."""
    device = existing_ancestor(path).stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return "an unknown filesystem"


def mount_point(path: Path) -> Path:
    """The mount point that ``path`` is below."""
    above = {path, *path.parents}
    return max(above & set(mount_points_under(Path("/"))), key=lambda point: len(point.parts))
