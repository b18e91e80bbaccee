"""The system calls Python does not wrap: the new mount API, openat2, user namespaces.

Numbers are those of the generic table that x86-64, arm64 and riscv share for everything added
since Linux 5.0 (include/uapi/asm-generic/unistd.h).  Every function raises OSError with the
kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
# Calls through this one keep the GIL, so that no other Python thread runs meanwhile.
_libc_locked = ctypes.PyDLL(None, use_errno=True)
# Of a process that waits to be killed, or for this many seconds if nobody is left to do it.
_IDLE_STACK_BYTES, _IDLE_SECONDS = 64 * 1024, 60
_idle_stack = ctypes.create_string_buffer(_IDLE_STACK_BYTES)

# The generic table's, but for x86-64.
_SYS_CLONE = 56 if platform.machine() == "x86_64" else 220
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_PR_SET_PDEATHSIG = 1
_PR_GET_DUMPABLE = 3
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_CAPBSET_DROP = 24
_SECCOMP_MODE_FILTER = 2
_SOCK_FILTER_BYTES = 8
_SIGSET_BYTES = 128
_CLONE_PARENT = 0x8000
_CLONE_VM = 0x100
_CAPABILITY_VERSION_3 = 0x2008_0522
_CAP_SYS_ADMIN = 21

# capability.h: the number of each capability that containers may keep (capabilities(7)).
CAPABILITY_NUMBERS = {
    "chown": 0,
    "dac_override": 1,
    "fowner": 3,
    "fsetid": 4,
    "kill": 5,
    "setgid": 6,
    "setuid": 7,
    "setpcap": 8,
    "net_bind_service": 10,
    "net_raw": 13,
    "sys_chroot": 18,
    "setfcap": 31,
}

# All namespaces of a container's own (namespaces(7)), which its init and all who enter it are in.
ALL_NAMESPACES = (
    os.CLONE_NEWUSER
    | os.CLONE_NEWNS
    | os.CLONE_NEWPID
    | os.CLONE_NEWNET
    | os.CLONE_NEWIPC
    | os.CLONE_NEWUTS
    | os.CLONE_NEWCGROUP
)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x0010_0000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_NOATIME = 0x400
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x4_0000
MS_SLAVE = 0x8_0000

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10


def _syscall(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _long(value: int) -> ctypes.c_long:
    # libc.syscall is variadic: a plain int would be passed as a 32-bit C int.
    return ctypes.c_long(value)


def openat2(
    path: str | Path, flags: int, *, dir_fd: int = AT_FDCWD, mode: int = 0, resolve: int = 0
) -> int:
    """Open ``path`` under the ``RESOLVE_*`` rules (openat2(2)); close-on-exec always."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _syscall(_SYS_OPENAT2, _long(dir_fd), os.fsencode(path), how, ctypes.c_size_t(len(how)))


def open_tree(path: str | Path, *, recursive: bool = False) -> int:
    """A descriptor of a detached copy of the mount at ``path`` (open_tree(2), OPEN_TREE_CLONE)."""
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    return _syscall(_SYS_OPEN_TREE, _long(AT_FDCWD), os.fsencode(path), _long(flags))


def mount_setattr(tree_fd: int, *, set_flags: int, userns_fd: int = 0) -> None:
    """Set ``MOUNT_ATTR_*`` flags on the mount ``tree_fd`` refers to (mount_setattr(2))."""
    attributes = struct.pack("QQQQ", set_flags, 0, 0, userns_fd)
    _syscall(
        _SYS_MOUNT_SETATTR,
        _long(tree_fd),
        b"",
        _long(AT_EMPTY_PATH),
        attributes,
        ctypes.c_size_t(len(attributes)),
    )


def move_mount(tree_fd: int, target: str | Path) -> None:
    """Attach a detached mount at ``target`` (move_mount(2))."""
    _syscall(
        _SYS_MOVE_MOUNT,
        _long(tree_fd),
        b"",
        _long(AT_FDCWD),
        os.fsencode(target),
        _long(MOVE_MOUNT_F_EMPTY_PATH),
    )


def move_mount_onto(tree_fd: int, target_fd: int) -> None:
    """Attach a detached mount at the directory ``target_fd`` refers to; no path is resolved."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_SYS_MOVE_MOUNT, _long(tree_fd), b"", _long(target_fd), b"", _long(flags))


def bind_idmapped(
    source: str | Path, target: str | Path, userns_fd: int, *, read_only: bool = False
) -> None:
    """Bind-mount ``source`` at ``target`` with ids shifted by the user namespace's mapping.

    On-disk id 0 shows as the namespace's host id of 0 and so on.  The filesystem must allow
    idmapped mounts (ext4, xfs, btrfs, tmpfs ≥ 6.3: mount_setattr(2)), else EINVAL.
    """
    tree_fd = open_tree(source)
    try:
        flags = MOUNT_ATTR_IDMAP | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if read_only else 0)
        mount_setattr(tree_fd, set_flags=flags, userns_fd=userns_fd)
        move_mount(tree_fd, target)
    finally:
        os.close(tree_fd)


def mount(
    source: str, target: str | Path, fstype: str | None, flags: int = 0, data: str | None = None
) -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if fstype is None else fstype.encode(),
        ctypes.c_ulong(flags),
        None if data is None else os.fsencode(data),
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def umount(target: str | Path, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2); ``flags`` are ``MNT_DETACH`` and ``UMOUNT_NOFOLLOW``."""
    if _libc.umount2(os.fsencode(target), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def umount_all(point: Path) -> None:
    """Unmount whatever is mounted at exactly ``point``, however many times; none is no error.

    Detaches what is in use (MNT_DETACH).  Looks at no other mount: mountinfo, which lists them all,
    would make stopping a container slower the more others there are.
    """
    while True:
        try:
            umount(point)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
                return
            if error.errno != errno.EBUSY:
                raise
            umount(point, MNT_DETACH | UMOUNT_NOFOLLOW)


def mount_points_under(root: Path) -> list[Path]:
    """Every mount point at or below ``root``, deepest (latest) first, from mountinfo (proc(5)).

    Not for what is done for each container: it reads the mounts of all of them.
    """
    root_bytes = os.fsencode(root)
    prefix = root_bytes.rstrip(b"/") + b"/"
    mounts: list[Path] = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        point = line.split(b" ", 5)[4]
        if b"\\" in point:
            point = point.decode("unicode_escape").encode("latin-1")
        if point == root_bytes or point.startswith(prefix):
            mounts.append(Path(os.fsdecode(point)))
    return mounts[::-1]


def create_user_namespace(extents: Sequence[tuple[int, int, int]], creator_uid: int = 0) -> int:
    """A descriptor of a new user namespace with these (inside, outside, count) uid/gid extents.

    ``creator_uid`` is the host id that creates it: everything that the kernel counts in there is
    charged to it (max_inotify_instances and the like in namespaces(7); RLIMIT_SIGPENDING,
    RLIMIT_MSGQUEUE and RLIMIT_MEMLOCK since Linux 5.14).  A process outside with that effective id
    controls the namespace (user_namespaces(7)).  Creates a process, as that id: call it from a
    single-threaded one only.
    """
    dumpable = _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1
    try:
        with _effective_uid(creator_uid):
            child = _clone_idle(os.CLONE_NEWUSER)
    except OSError as error:
        reason = f"the kernel refused a new user namespace (clone(2)): {error.strerror}"
        raise OSError(error.errno, reason) from None
    try:
        mapping = "".join(f"{inside} {outside} {count}\n" for inside, outside, count in extents)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text(mapping)
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # Another effective id has changed it (prctl(2)).
        set_dumpable(dumpable=dumpable)


@contextmanager
def _effective_uid(uid: int) -> Iterator[None]:
    """Have this effective id in the block, and no capability in effect but to administer."""
    if uid == 0:
        yield
        return
    permitted = _permitted_capabilities()
    os.setresuid(-1, uid, -1)
    try:
        # Some distributions require this capability (kernel.unprivileged_userns_clone).
        _set_capabilities(permitted, 1 << _CAP_SYS_ADMIN)
        yield
    finally:
        # What is permitted is then in effect again (capabilities(7)).
        os.setresuid(-1, 0, -1)


def set_dumpable(*, dumpable: bool) -> None:
    """Set whether this process may be traced and dumped (PR_SET_DUMPABLE in prctl(2)).

    A forked child inherits it; execve resets it.
    """
    if _libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(dumpable), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent() -> None:
    """Have this process killed when the one that created it exits (PR_SET_PDEATHSIG in prctl(2)).

    Any later change of its user ids or capabilities undoes it.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def clone_as_sibling() -> int:
    """Copy this process as fork(2) does, as a child of its *parent* (CLONE_PARENT in clone(2)).

    Returns the copy's pid, and 0 in the copy.  Only for a single-threaded process: no fork handlers
    run, neither Python's nor the C library's.
    """
    return _clone(_CLONE_PARENT)


def _clone(flags: int = 0) -> int:
    # A third cheaper than os.fork, which runs handlers that only threads need.
    arguments = (ctypes.c_long(flags | signal.SIGCHLD), *(ctypes.c_long(0),) * 4)
    result: int = _libc_locked.syscall(_SYS_CLONE, *arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _clone_idle(flags: int) -> int:
    """Create a process that does nothing until it is killed; returns its pid.

    It shares this one's memory (CLONE_VM in clone(2)), which takes a fraction of a copy.  Only one
    at a time: it waits in sleep(3), on a stack of its own.
    """
    entry = ctypes.cast(_libc.sleep, ctypes.c_void_p)
    top = ctypes.addressof(_idle_stack) + _IDLE_STACK_BYTES
    options = flags | _CLONE_VM | signal.SIGCHLD
    seconds = ctypes.c_void_p(_IDLE_SECONDS)
    result: int = _libc.clone(entry, ctypes.c_void_p(top & ~15), options, seconds)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def create_signalfd(number: signal.Signals) -> int:
    """Block a signal and return a descriptor to read it from (signalfd(2)).

    The block is inherited across fork and execve.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    mask = (1 << (number - 1)).to_bytes(_SIGSET_BYTES, sys.byteorder)
    result: int = _libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def inotify_init() -> int:
    """A new instance of inotify(7), close-on-exec, whose reads do not wait."""
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add_watch(instance: int, path: str | Path, events: int) -> int:
    """Watch a file for ``IN_*`` events; the watch's number, which is that of its inode."""
    return _checked(_libc.inotify_add_watch(instance, os.fsencode(path), ctypes.c_uint32(events)))


def inotify_rm_watch(instance: int, watch: int) -> None:
    """End a watch.  Raises OSError (EINVAL) if it has ended by itself."""
    _checked(_libc.inotify_rm_watch(instance, watch))


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def parent_of(pid: int) -> int | None:
    """The parent of a process (ppid in proc(5)): LXC's monitor, for a container's init.

    None if it has exited."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1])


def exit_status(pid: int) -> int | None:
    """The wait status (wait(2)) of a process that has exited but is not reaped yet, or None.

    The last field of stat (proc(5)), which requires permission to trace it.  Raises OSError.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[-1]) if state == "Z" else None


def drop_from_bounding_set(numbers: Iterable[int]) -> None:
    """Prevent any program executed from now on from gaining these (PR_CAPBSET_DROP in prctl(2))."""
    for number in numbers:
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def last_capability() -> int:
    """The highest capability that this kernel supports (cap_last_cap in proc(5))."""
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def set_capabilities(numbers: Iterable[int]) -> None:
    """Make exactly these permitted and effective, and none inheritable (capset(2))."""
    bits = sum(1 << number for number in numbers)
    _set_capabilities(bits, bits)


def _set_capabilities(permitted: int, effective: int) -> None:
    words = (word for shift in (0, 32) for word in (effective >> shift, permitted >> shift, 0))
    data = struct.pack("6I", *(word & 0xFFFF_FFFF for word in words))
    if _libc.capset(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _permitted_capabilities() -> int:
    data = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("Ii", _CAPABILITY_VERSION_3, 0), data) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    _, low, _, _, high, _ = struct.unpack("6I", data)
    return int(low | high << 32)


class SyscallFilter:
    """A seccomp program (classic BPF, seccomp(2)) ready to be installed."""

    def __init__(self, program: bytes) -> None:
        # Kept alive with the object: the kernel reads it through the pointer in struct sock_fprog.
        self._program = ctypes.create_string_buffer(program, len(program))
        count = len(program) // _SOCK_FILTER_BYTES
        self._header = struct.pack("@HP", count, ctypes.addressof(self._program))

    def install(self) -> None:
        """Confine this thread permanently; it needs CAP_SYS_ADMIN in its user namespace."""
        if _libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._header, 0, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def set_command_line(title: str) -> None:
    """Show ``title`` as this process's command line (cmdline in proc(5)), as far as it fits.

    Every process in the same pid namespace can read it; the original arguments are overwritten in
    place, between the addresses in fields 48 and 49 of stat.
    """
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    visible = title.encode()[: end - start - 1]
    ctypes.memmove(start, visible.ljust(end - start, b"\0"), end - start)


def fsync(path: Path) -> None:
    """Flush a file, or a directory's entries, to disk (fsync(2)).  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def syncfs(path: Path) -> None:
    """Flush the filesystem that holds ``path`` to disk (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(descriptor)
