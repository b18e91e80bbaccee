"""Attacks on what a container finds around it: devices, /proc, /sys, groups, ids, limits, others.

``HOST_PIDS`` and ``HOST_PATHS`` in the environment name processes and paths of the host, each
separated by colons.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import re
import resource
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.host.attacks.harness import Held, Table, check, libc, main, number, syscall

TABLE = Table()
PTRACE = number(101, 117)


def host_pids() -> list[int]:
    return [int(pid) for pid in os.environ["HOST_PIDS"].split(":")]


def host_paths() -> list[str]:
    return os.environ["HOST_PATHS"].split(":")


# Devices ------------------------------------------------------------------------------------

DEVICES = {
    "sda": (stat.S_IFBLK, 8, 0),
    "vda": (stat.S_IFBLK, 254, 0),
    "loop0": (stat.S_IFBLK, 7, 0),
    "loop-control": (stat.S_IFCHR, 10, 237),
    "mem": (stat.S_IFCHR, 1, 1),
    "kmem": (stat.S_IFCHR, 1, 2),
    "port": (stat.S_IFCHR, 1, 4),
    "kmsg": (stat.S_IFCHR, 1, 11),
    "fuse": (stat.S_IFCHR, 10, 229),
    "net/tun": (stat.S_IFCHR, 10, 200),
    "kvm": (stat.S_IFCHR, 10, 232),
    "tty1": (stat.S_IFCHR, 4, 1),
}


def make_node(kind: int, major: int, minor: int, directory: str) -> None:
    path = f"{directory}/node{os.getpid()}"
    os.mkfifo(path)  # The control: nodes that are no devices can be made here.
    os.unlink(path)
    os.mknod(path, kind | 0o666, os.makedev(major, minor))


def open_device(name: str) -> None:
    assert os.path.exists("/dev/null")
    os.open(f"/dev/{name}", os.O_RDWR)


for device, (kind_of_node, major, minor) in DEVICES.items():
    attempt = partial(make_node, kind_of_node, major, minor, "/workspace")
    TABLE.add(f"make the device {device}", attempt, "EPERM")
    TABLE.add(f"open /dev/{device}", partial(open_device, device), "ENOENT")
for place in ("/root", "/dev", "/dev/shm", "/tmp"):
    attempt = partial(make_node, stat.S_IFBLK, 254, 0, place)
    TABLE.add(f"make a disk's node in {place}", attempt, "EPERM")


@TABLE.attack("find another device than the usual ones")
def _() -> None:
    usual = {"full", "null", "ptmx", "random", "tty", "urandom", "zero"}
    nodes = {
        entry.name
        for entry in os.scandir("/dev")
        if not stat.S_ISLNK(entry.stat(follow_symlinks=False).st_mode)
    }
    assert "null" in nodes
    extra = {name for name in nodes - usual if not stat.S_ISDIR(os.stat(f"/dev/{name}").st_mode)}
    if extra <= {".lxc-boot-id"}:
        raise Held(f"there is nothing but {sorted(nodes)}")


# /proc and /sys -----------------------------------------------------------------------------


def write(path: str, data: str) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(data.encode())


def absent(path: str) -> tuple[str, ...]:
    """What else to expect of a path that this machine's kernel has not."""
    return () if os.path.exists(path) else ("ENOENT",)


SETTINGS = {
    "kernel/core_pattern": "|/bin/sh",
    "kernel/modprobe": "/bin/sh",
    "kernel/panic": "1",
    "kernel/hostname": "owned",
    "kernel/domainname": "owned",
    "kernel/sysrq": "1",
    "kernel/randomize_va_space": "0",
    "kernel/ns_last_pid": "1",
    "kernel/shmmax": "1",
    "kernel/yama/ptrace_scope": "0",
    "vm/overcommit_memory": "2",
    "vm/drop_caches": "3",
    "vm/mmap_min_addr": "0",
    "fs/suid_dumpable": "2",
    "fs/binfmt_misc/register": ":x:M::x::/bin/sh:",
    "net/ipv4/ip_forward": "1",
    "net/ipv4/ping_group_range": "1 0",
    "user/max_user_namespaces": "0",
}
for setting, wanted in SETTINGS.items():
    attempt = partial(write, f"/proc/sys/{setting}", wanted)
    refusals = ("EROFS", "EACCES", *absent(f"/proc/sys/{setting}"))
    TABLE.add(f"write /proc/sys/{setting}", attempt, *refusals)

WRITES = {
    "/proc/sysrq-trigger": ("c", ("EACCES", "EROFS", "EPERM")),
    "/sys/kernel/uevent_helper": ("/bin/sh", ("EROFS", "EACCES")),
    "/sys/kernel/rcu_expedited": ("1", ("EROFS", "EACCES")),
    "/sys/kernel/mm/transparent_hugepage/enabled": ("never", ("EROFS", "EACCES")),
    "/sys/class/net/lo/mtu": ("1000", ("EROFS", "EACCES")),
    "/proc/self/oom_score_adj": ("-1000", ("EACCES", "EPERM")),
    "/proc/1/oom_score_adj": ("-1000", ("EACCES", "EPERM")),
    "/proc/self/uid_map": ("0 0 4294967295", ("EPERM",)),
    "/proc/self/gid_map": ("0 0 4294967295", ("EPERM",)),
    "/proc/self/setgroups": ("deny", ("EPERM", "EACCES")),
}
for path, (words, errors) in WRITES.items():
    TABLE.add(f"write {path}", partial(write, path, words), *errors, *absent(path))

# What the host writes while a container has it open.
TOLD = ("cpuinfo", "loadavg", "meminfo", "stat")


def take_lease(path: str) -> None:
    """Have whoever writes wait until it is given up (fcntl(2))."""
    own = Path(tempfile.mkdtemp(), "own")
    own.write_bytes(b"")
    with own.open("rb") as control:
        fcntl.fcntl(control, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    with open(path, "rb") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)


for name in TOLD:
    TABLE.add(f"write /proc/{name}", partial(write, f"/proc/{name}", "1"), "EROFS", "EACCES")
    TABLE.add(f"take a lease on /proc/{name}", partial(take_lease, f"/proc/{name}"), "EACCES")


def read(path: str) -> None:
    """Read it; nothing to be read is a refusal, too."""
    assert Path("/proc/self/stat").read_bytes()
    if os.path.isdir(path):
        if not os.listdir(path):
            raise Held("an empty directory")
        return
    with open(path, "rb") as file:
        if not file.read(64):
            raise Held("an empty file")


SECRETS = {
    **dict.fromkeys(("kallsyms", "keys", "key-users", "interrupts", "timer_list"), ("held",)),
    **dict.fromkeys(("sched_debug", "latency_stats"), ("held",)),
    # Empty, and where there is AppArmor not to be opened either.
    "kcore": ("held", "EACCES"),
    **dict.fromkeys(("acpi", "bus", "fs", "irq", "diskstats", "partitions"), ("held",)),
    **dict.fromkeys(("kmsg", "kpagecount", "kpageflags", "slabinfo"), ("EACCES", "EPERM")),
    **dict.fromkeys(("vmallocinfo", "pagetypeinfo"), ("EACCES", "EPERM")),
}
for name, refusals in SECRETS.items():
    TABLE.add(
        f"read /proc/{name}", partial(read, f"/proc/{name}"), *refusals, *absent(f"/proc/{name}")
    )
# Modules: each is there once one of its file systems was mounted on the machine.
MODULES = ("fs/ext4", "fs/xfs", "fs/btrfs")
SYSTEM = ("firmware", "kernel/debug", "kernel/tracing", "kernel/security", "fs/cgroup", *MODULES)
for name in SYSTEM:
    refusals = ("held", "EACCES", *absent(f"/sys/{name}"), *(["ENOENT"] if name in MODULES else []))
    TABLE.add(f"read /sys/{name}", partial(read, f"/sys/{name}"), *refusals)


@TABLE.attack("find the host's paths in mounts, environments and command lines")
def _() -> None:
    files = glob.glob("/proc/[0-9]*/*")
    seen = b""
    for file in files:
        if file.rpartition("/")[2] in ("mountinfo", "mounts", "mountstats", "cmdline", "environ"):
            if int(file.split("/")[2]) == os.getpid() and file.endswith("environ"):
                continue  # What the test itself told this program.
            if int(file.split("/")[2]) == os.getppid() and file.endswith("environ"):
                continue
            seen += Path(file).read_bytes()
    assert b" overlay " in seen
    assert b".orkestr/init" in seen
    found = [path for path in host_paths() if path.encode() in seen]
    if not found:
        raise Held(f"{len(seen)} bytes tell of none")


@TABLE.attack("learn from the machine's disks what they are made of")
def _() -> None:
    disks = [
        name
        for where in ("block", "class/block", "dev/block")
        for name in glob.glob(f"/sys/{where}/*")
    ]
    assert disks, "no disk is to be seen at all"
    seen = b""
    for disk in disks:
        for file in (*glob.glob(f"{disk}/loop/*"), *glob.glob(f"{disk}/uevent")):
            seen += Path(file).read_bytes()
    found = [path for path in (*host_paths(), ".img") if path.encode() in seen]
    if not found:
        raise Held(f"{len(disks)} names, {len(seen)} bytes tell of none")


@TABLE.attack("learn from init's environment and descriptors")
def _() -> None:
    environment = Path("/proc/1/environ").read_bytes()
    targets = {os.readlink(link) for link in glob.glob("/proc/1/fd/*")}
    assert "/dev/null" in targets
    if environment == b"container=lxc\0" and targets <= {"/dev/null", "anon_inode:[signalfd]"}:
        raise Held(f"{environment!r} {targets}")


def enter_host_path(index: int) -> None:
    path = host_paths()[index]
    for start in ("", "/proc/1/root", "/proc/self/root", "/proc/1/cwd/..", "/.."):
        if os.path.lexists(start + path):
            return
    os.stat(path)


for index in range(3):
    TABLE.add(f"reach path {index} of the host", partial(enter_host_path, index), "ENOENT")


# Control groups -----------------------------------------------------------------------------


@TABLE.attack("find a release_agent or a control group to write")
def _() -> None:
    mounted = [line for line in Path("/proc/mounts").read_text().splitlines() if " cgroup" in line]
    names = ("release_agent", "notify_on_release", "cgroup.procs", "memory.limit_in_bytes")
    roots = ("/sys/fs", "/run", "/mnt", "/var")
    found = [
        str(Path(at, name))
        for root in roots
        for at, _, files in os.walk(root)
        for name in names
        if name in files
    ]
    assert Path("/proc/self/cgroup").read_text()
    if not mounted and not found:
        raise Held("none is mounted, and no such file is anywhere")


TABLE.add("make a control group", partial(os.mkdir, "/sys/fs/cgroup/x"), "EROFS", "ENOENT")


# Processes of the host ----------------------------------------------------------------------


def signal_host(number_of_signal: int) -> None:
    os.kill(os.getpid(), 0)
    for pid in host_pids():
        try:
            os.kill(pid, number_of_signal)
        except ProcessLookupError:
            continue
        return
    raise ProcessLookupError(3, "none of them is there")


def trace(pid: int) -> None:
    syscall(PTRACE, 16, pid, 0, 0)


TABLE.add("look for the host's processes (kill 0)", partial(signal_host, 0), "ESRCH")
TABLE.add("stop the host's processes (kill 19)", partial(signal_host, 19), "ESRCH")
TABLE.add("trace a process of the host", lambda: trace(host_pids()[0]), "ESRCH")
TABLE.add("the host's process in /proc", lambda: read(f"/proc/{host_pids()[0]}/status"), "ENOENT")
TABLE.add("pidfd_open on the host's", lambda: check(syscall(434, host_pids()[0], 0)), "ESRCH")


@TABLE.attack("see processes that are not the container's")
def _() -> None:
    seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
    assert {1, os.getpid()} <= set(seen)
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in seen]
    if len(seen) <= 4 and set(names) <= {"init", "python3", "bash"}:
        raise Held(str(names))


@TABLE.attack("find a process that no filter confines")
def _() -> None:
    lines = {}
    for file in glob.glob("/proc/[0-9]*/status"):
        found = re.findall(r"^Seccomp(?:_filters)?:\t(\d+)$", Path(file).read_text(), re.M)
        lines[file] = tuple(map(int, found))
    assert "/proc/1/status" in lines
    if all(mode == 2 and filters >= 1 for mode, filters in lines.values()):
        raise Held(str(lines))


# Ids, capabilities, limits ------------------------------------------------------------------


def give_away(uid: int) -> None:
    with tempfile.NamedTemporaryFile(dir="/workspace") as file:
        os.chown(file.name, 2**31 - 2, 2**31 - 2)  # The control: the last id that there is.
        os.chown(file.name, uid, uid)


def become(call: Callable[..., None], *uids: int) -> None:
    os.setresuid(-1, 0, -1)  # The control: what changes nothing.
    call(*uids)


TABLE.add("give a file to an id of the host", partial(give_away, 2**31 - 1), "EINVAL")
TABLE.add("give a file to nobody's id", partial(give_away, 2**32 - 2), "EINVAL")
# Those from 65,536 on own files, and are the same for all containers.
for far in (65_536, 70_000, 1_000_000_000, 2**31 - 2):
    TABLE.add(f"setuid to {far}", partial(become, os.setuid, far), "EINVAL")
    TABLE.add(f"setreuid to {far}", partial(become, os.setreuid, far, -1), "EINVAL")
    TABLE.add(f"setresuid to {far}", partial(become, os.setresuid, far, far, far), "EINVAL")

KEPT = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 31}


def capabilities() -> dict[str, set[int]]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines if line.startswith(("Cap", "NoNew")))
    return {
        name: {bit for bit in range(64) if int(value, 16) >> bit & 1}
        for name, value in fields.items()
    }


@TABLE.attack("have a capability that is not on the list")
def _() -> None:
    mine = capabilities()
    init = Path("/proc/1/status").read_text()
    assert f"CapBnd:\t{sum(1 << bit for bit in KEPT):016x}" in init
    assert f"CapBnd:\t{sum(1 << bit for bit in KEPT):016x}" in init
    sets = (mine["CapBnd"], mine["CapPrm"], mine["CapEff"])
    if all(found == KEPT for found in sets) and not mine["CapInh"] | mine["CapAmb"]:
        raise Held(str(mine))


@TABLE.attack("take a capability back (capset)", "EPERM")
def _() -> None:
    header = struct.pack("=Ii", 0x2008_0522, 0)
    everything = struct.pack("=6I", *[0xFFFF_FFFF, 0xFFFF_FFFF, 0] * 2)
    check(libc.capset(header, everything))


def effective_of_copy(capability: int) -> int:
    """What a copy of cat with a file capability (capabilities(7)) gets for a user who has none."""
    path = f"/root/capable{os.getpid()}"
    shutil.copy("/usr/bin/cat", path)
    low, high = (1 << capability) & 0xFFFF_FFFF, (1 << capability) >> 32
    os.setxattr(path, "security.capability", struct.pack("<5I", 0x0200_0001, low, 0, high, 0))
    os.chmod("/root", 0o755)
    shown = subprocess.run([path, "/proc/self/status"], stdout=subprocess.PIPE, user=65_534)
    os.unlink(path)
    return int(shown.stdout.partition(b"CapEff:")[2].split()[0], 16)


@TABLE.attack("a program with a file capability that the container has not", "EPERM")
def _() -> None:
    assert effective_of_copy(7) == 1 << 7
    effective_of_copy(21)


@TABLE.attack("a set-user-id program of another's id")
def _() -> None:
    path = "/workspace/suid"
    shutil.copy("/usr/bin/cat", path)
    os.chown(path, 1234, 1234)
    os.chmod(path, 0o6755)
    text = subprocess.run([path, "/proc/self/status"], capture_output=True, text=True).stdout
    uids = text.partition("Uid:")[2].split()[:4]
    assert len(uids) == 4
    if uids == ["0"] * 4:
        raise Held("/workspace is mounted nosuid")


def raise_limit(which: int) -> None:
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (min(soft, 1), hard))  # The control: lower is allowed.
    two = struct.pack("=2Q", hard, hard + 1)
    check(libc.prlimit(0, which, two, None))


for limit in ("NOFILE", "CORE", "MEMLOCK", "MSGQUEUE", "SIGPENDING", "NPROC"):
    attempt = partial(raise_limit, getattr(resource, f"RLIMIT_{limit}"))
    TABLE.add(f"raise RLIMIT_{limit}", attempt, "EPERM")


@TABLE.attack("raise init's limits (prlimit)", "EPERM")
def _() -> None:
    resource.prlimit(1, resource.RLIMIT_CORE, (1 << 20, 1 << 20))


@TABLE.attack("have a core written")
def _() -> None:
    os.chdir(tempfile.mkdtemp(dir="/workspace"))
    if os.fork() == 0:
        os.abort()
    _, status = os.wait()
    assert os.WTERMSIG(status) == 6
    if not os.WCOREDUMP(status) and not os.listdir("."):
        raise Held("no core")


TABLE.add("a better place in the queue (nice)", partial(os.nice, -5), "EPERM", "EACCES")


@TABLE.attack("a real-time place in the queue", "EPERM")
def _() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))


@TABLE.attack("use up the inodes of /dev/shm", "ENOSPC")
def _() -> None:
    place = tempfile.mkdtemp(dir="/dev/shm")
    try:
        for count in range(200_000):
            os.close(os.open(f"{place}/{count}", os.O_CREAT))
    finally:
        shutil.rmtree(place)


for attribute in ("trusted.overlay.opaque", "trusted.overlay.redirect", "security.ima"):
    attempt = partial(os.setxattr, "/root", attribute, b"y")
    TABLE.add(f"set {attribute}", attempt, "EPERM", "ENOTSUP", "EOPNOTSUPP")


@TABLE.attack("make a whiteout in the root", "EPERM")
def _() -> None:
    os.mknod(f"/root/whiteout{os.getpid()}", stat.S_IFCHR | 0o644, 0)


@TABLE.attack("move the immutable mark (chattr)", "EPERM", "ENOTTY", "ENOTSUP", "EOPNOTSUPP")
def _() -> None:
    with open("/root/marked", "w") as file:
        flags = ctypes.c_long(0x10)
        check(libc.ioctl(file.fileno(), ctypes.c_ulong(0x4008_6602), ctypes.byref(flags)))


@TABLE.attack("read what a masked path hides, by its directory's descriptor")
def _() -> None:
    directory = os.open("/proc/1/root/proc", os.O_RDONLY)
    found = os.open("kallsyms", os.O_RDONLY, dir_fd=directory)
    numbers = re.findall(rb"[1-9a-f]{8,}", os.read(found, 4096))
    if not numbers:
        raise Held("nothing there either")


if __name__ == "__main__":
    main(TABLE)
