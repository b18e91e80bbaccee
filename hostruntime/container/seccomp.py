"""The system calls a container may not make: one table, as LXC's profile and as a filter.

As a *profile* it is a deny list in LXC's second format (lxc.container.conf(5),
``lxc.seccomp.profile``), which LXC installs before it executes init.  As a *program* it is what
libseccomp compiles, to be installed in each attached process: LXC would read and compile the
profile anew for every one of them, which takes some 3 ms.  Both cover every ABI the processor
runs (on x86-64 also i386 and x32, on arm64 also arm); names that an architecture or an older
libseccomp does not know are passed over.  Calls newer than this table are not there for attached
processes, which is to say for all but init, by their number: nobody has looked at them.

The container's user namespace already takes most of the power from these calls.  Denying them
keeps the code behind them, which is where the kernel's holes have been, out of reach altogether.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hostruntime.host.paths import IDS_PER_SLOT, write_atomically

# clone(2), unshare(2): a nested user namespace would give all capabilities back.
_NAMESPACE_FLAGS = {
    "CLONE_NEWNS": 0x0002_0000,
    "CLONE_NEWCGROUP": 0x0200_0000,
    "CLONE_NEWUTS": 0x0400_0000,
    "CLONE_NEWIPC": 0x0800_0000,
    "CLONE_NEWUSER": 0x1000_0000,
    "CLONE_NEWPID": 0x2000_0000,
    "CLONE_NEWNET": 0x4000_0000,
}
_CLONE_NEWTIME = 0x80  # unshare only: in clone's flags these bits are the exit signal

# Programs fall back when a kernel has none of these, and they do not when they are forbidden.
_ABSENT = (
    "clone3",  # its flags are in memory, out of a filter's sight; glibc falls back to clone
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "open_tree",
    "move_mount",
    "mount_setattr",
    "memfd_secret",
    "modify_ldt",
    # One pool for the machine (fs.aio-max-nr): programs then read and write in threads.
    "io_setup",
    *("statmount", "listmount", "open_tree_attr"),
    *("lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules"),
)
# removexattrat(2) of Linux 6.13. Numbers are the same everywhere since 5.0.
_LAST_NUMBER = 466
# From statmount to lsm_list_modules, for a libseccomp that has no names for them.
_UNNAMED = (457, 461)

_FORBIDDEN = (
    # Mounts and namespaces.
    *("mount", "umount", "umount2", "pivot_root", "setns"),
    # The kernel itself, its modules, its log, the machine's power.
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    *("reboot", "syslog"),
    # Programs run by the kernel, and looking into it.
    *("bpf", "perf_event_open", "userfaultfd", "fanotify_init"),
    # Kernel objects that belong to no namespace, or get around paths.
    *("add_key", "request_key", "keyctl", "open_by_handle_at"),
    # The machine's clock, disks, ports, accounting, consoles.
    *("settimeofday", "clock_settime", "clock_settime64", "stime"),
    *("swapon", "swapoff", "quotactl", "quotactl_fd", "acct"),
    *("iopl", "ioperm", "vhangup"),
)

# socket(2): AF_UNIX (1), AF_INET (2), AF_INET6 (10) and AF_NETLINK (16) are what programs use.
# The others below 16, as (mask, value): 0, 3, 4 to 7, 8 and 9, 11, 12 to 15.
_LOW_32 = 0xFFFF_FFFF
_OTHER_FAMILIES = (
    *((_LOW_32, 0), (_LOW_32, 3), (_LOW_32 - 3, 4), (_LOW_32 - 1, 8)),
    *((_LOW_32, 11), (_LOW_32 - 3, 12)),
)
_UNIX_FAMILY = 1
_LAST_FAMILY = 16
# netlink(7): NETLINK_ROUTE (0) and NETLINK_SOCK_DIAG (4) are what ip, ss and the C library use.
# The others carry the whole machine's events, or load the module that they are for: 1, 2 and 3, 5,
# 6 and 7, 8 to 15, 16 to 31, the last there can be.
_OTHER_NETLINK = (
    *((_LOW_32, 1), (_LOW_32 - 1, 2), (_LOW_32, 5), (_LOW_32 - 1, 6)),
    *((_LOW_32 - 7, 8), (_LOW_32 - 15, 16)),
)
# Protocols of IP that are modules of their own: DCCP, SCTP, UDP-Lite, MPTCP (IANA's numbers, and
# in.h's). No other family has any of these.
_OTHER_PROTOCOLS = (33, 132, 136, 262)

# The calls that give a process another real id, by which the kernel finds the user whose epoll
# watches, pipes and passed descriptors it counts (struct user_struct).  Their first argument is
# that id; for these two, all bits set means "as it is".
_REAL_ID_OR_NONE = ("setreuid", "setreuid32", "setresuid", "setresuid32")
_REAL_ID = ("setuid", "setuid32")
_FAR_BITS = [1 << bit for bit in range(16, 31)]
_TOP_BIT = 1 << 31
_LAST_ID = IDS_PER_SLOT - 1

# ioctl_tty(2): two put input into a terminal as if it had been typed, one gives it another line
# discipline, each of which is a module.
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423


_LIBRARY = "libseccomp.so.2"
# seccomp.h: actions, attributes, comparisons and the architectures beside the native one.
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_NO_NEW_PRIVS, _UNKNOWN = 3, -1
_OPERATIONS = {"SCMP_CMP_EQ": 4, "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}
_OTHER_ABIS = {"x86_64": (0x4000_0003, 0x4000_003E), "aarch64": (0x4000_0028,)}
_DOMAIN_ERROR = -errno.EDOM


@dataclass(frozen=True)
class Argument:
    """A condition on a call's argument ``index``: compared, for MASKED_EQ after ``mask``."""

    index: int
    operation: str
    value: int
    mask: int = 0


@dataclass(frozen=True)
class Rule:
    """A call that fails with ``error``, if all conditions on its arguments hold."""

    name: str
    error: int
    arguments: tuple[Argument, ...] = ()

    def line(self) -> str:
        """The rule in an LXC profile."""
        conditions = "".join(map(_condition, self.arguments))
        return f"{self.name} errno {self.error}" + (f" {conditions}" if conditions else "")


def _condition(a: Argument) -> str:
    # LXC takes the mask last, libseccomp first.
    mask = f",{a.mask}" if a.operation == "SCMP_CMP_MASKED_EQ" else ""
    return f"[{a.index},{a.value},{a.operation}{mask}]"


def rules() -> Iterator[Rule]:
    """Everything that is denied."""
    # umount(2) with MNT_FORCE, LXC's reject_force_umount, goes with all of umount.
    yield from (Rule(name, errno.ENOSYS) for name in _ABSENT)
    yield from (Rule(name, errno.EPERM) for name in _FORBIDDEN)
    for call in ("clone", "unshare"):
        yield from (_bits(call, 0, flag, flag) for flag in _NAMESPACE_FLAGS.values())
    yield _bits("unshare", 0, _CLONE_NEWTIME, _CLONE_NEWTIME)
    # Those beyond are all containers' (HIGH_IDS), and what is counted would be counted together.
    beyond = (Argument(0, "SCMP_CMP_GT", _LAST_ID),)
    yield from (Rule(call, errno.EINVAL, beyond) for call in _REAL_ID)
    for call in _REAL_ID_OR_NONE:
        yield from (_bits(call, 0, _TOP_BIT | bit, bit, errno.EINVAL) for bit in _FAR_BITS)
    # The kernel looks at 32 bits of these; with all 64 compared, a bit above would get it through.
    terminals = (_TIOCSTI, _TIOCLINUX, _TIOCSETD)
    yield from (_bits("ioctl", 1, _LOW_32, what) for what in terminals)
    yield from _socket_rules()


def _socket_rules() -> Iterator[Rule]:
    # For i386, libseccomp also denies making sockets by socketcall(2), whose arguments are in
    # memory: programs have not done so since 2016.
    for mask, value in _OTHER_FAMILIES:
        yield _bits("socket", 0, mask, value, errno.EAFNOSUPPORT)
    yield Rule("socket", errno.EAFNOSUPPORT, (Argument(0, "SCMP_CMP_GT", _LAST_FAMILY),))
    for protocol in _OTHER_PROTOCOLS:
        yield _bits("socket", 2, _LOW_32, protocol, errno.EPROTONOSUPPORT)
    for mask, value in _OTHER_NETLINK:
        both = (_masked(0, _LOW_32, _LAST_FAMILY), _masked(2, mask, value))
        yield Rule("socket", errno.EPROTONOSUPPORT, both)
    # It makes a socket of the family, loading its module, before it finds that pairs are not to
    # be had of it: only those of AF_UNIX are of use.
    yield Rule("socketpair", errno.EAFNOSUPPORT, (Argument(0, "SCMP_CMP_GT", _UNIX_FAMILY),))


def _bits(name: str, argument: int, mask: int, value: int, error: int = errno.EPERM) -> Rule:
    """Deny when ``argument & mask == value``."""
    return Rule(name, error, (_masked(argument, mask, value),))


def _masked(argument: int, mask: int, value: int) -> Argument:
    return Argument(argument, "SCMP_CMP_MASKED_EQ", value, mask)


# As LXC's profile -------------------------------------------------------------------------


@cache
def profile() -> str:
    """The profile, as the text of a file."""
    return "\n".join(["2", "denylist", "[all]", *(rule.line() for rule in rules()), ""])


def profile_in(directory: Path) -> Path:
    """The profile as a file in ``directory``, written there once.  Raises OSError.

    It is named after its content, as LXC may read it again for as long as the container runs.
    """
    text = profile().encode()
    path = directory / f"seccomp-{hashlib.sha256(text).hexdigest()[:16]}"
    if not path.exists():
        write_atomically(path, text)
    return path


# As a program -----------------------------------------------------------------------------


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def program() -> bytes:
    """The filter as classic BPF (struct sock_filter of seccomp(2)).  Raises OSError."""
    library = ctypes.CDLL(_LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(_ALLOW))
    try:
        _check(library.seccomp_attr_set(context, _NO_NEW_PRIVS, 0))
        for abi in _OTHER_ABIS.get(platform.machine(), ()):
            _check(library.seccomp_arch_add(context, abi))
        for rule in rules():
            _add(library, context, rule)
        return _newer_calls_absent() + _exported(library, context)
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, rule: Rule) -> None:
    number = library.seccomp_syscall_resolve_name(rule.name.encode())
    if number == _UNKNOWN:
        return
    count = len(rule.arguments)
    comparisons = (_Comparison * max(count, 1))()
    for at, a in enumerate(rule.arguments):
        pair = (a.mask, a.value) if a.operation == "SCMP_CMP_MASKED_EQ" else (a.value, 0)
        comparisons[at] = _Comparison(a.index, _OPERATIONS[a.operation], *pair)
    action = _ERRNO | rule.error
    result = library.seccomp_rule_add_array(context, action, number, count, comparisons)
    # A call that none of the architectures has.
    _check(0 if result == _DOMAIN_ERROR else result)


def _newer_calls_absent() -> bytes:
    """What runs before libseccomp's program: instructions of classic BPF (bpf_common.h, filter.h).

    Load the call's number, the first word of struct seccomp_data; refuse it above the last that is
    known, and within those that have no name everywhere.  x32's are all above.
    """
    if platform.machine() != "x86_64":
        # arm has calls of its own high above (ARM_NR_BASE), which programs need.
        return b""
    load, greater, at_least, result = 0x20, 0x25, 0x35, 0x06
    first, last = _UNNAMED
    return b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (load, 0, 0, 0),
            (greater, 2, 0, _LAST_NUMBER),
            (at_least, 0, 2, first),
            (greater, 1, 0, last),
            (result, 0, 0, _ERRNO | errno.ENOSYS),
        )
    )


def _exported(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        _check(library.seccomp_export_bpf(context, descriptor))
        file.seek(0)
        return file.read()


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {os.strerror(-result)}")
