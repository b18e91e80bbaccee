"""The system calls denied to containers: one table, as LXC's profile and as a filter.

As a *profile* it is a deny list in LXC's second format (lxc.container.conf(5),
``lxc.seccomp.profile``), which LXC installs before it executes init.  As a *program* it is what
libseccomp compiles, to be installed in each attached process: LXC would read and compile the
profile anew for every one of them, which takes some 3 ms.  Both cover every ABI the processor
runs (on x86-64 also i386 and x32, on arm64 also arm); names that an architecture or an older
libseccomp does not know are skipped.  Attached processes, that is, all except init, also get
ENOSYS for calls newer than this table, by number, as nobody has reviewed them.

The container's user namespace already makes most of these calls harmless.  Denying them also makes
the code behind them unreachable, where the kernel's vulnerabilities have been.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hostruntime.host.ids import IDS_PER_SLOT
from hostruntime.host.writing import write_atomically

# clone(2), unshare(2): a nested user namespace would restore all capabilities.
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

# Programs have fallbacks for kernels without these calls (ENOSYS), but not for EPERM.
_UNIMPLEMENTED = (
    "clone3",  # its flags are in memory, which a filter cannot read; glibc falls back to clone
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
    # A machine-wide pool (fs.aio-max-nr); programs fall back to threads.
    "io_setup",
    *("statmount", "listmount", "open_tree_attr"),
    *("lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules"),
)
# removexattrat(2) of Linux 6.13. Numbers are the same everywhere since 5.0.
_LAST_NUMBER = 466
# statmount to lsm_list_modules, for a libseccomp that does not know their names.
_UNNAMED_RANGE = (457, 461)

_FORBIDDEN = (
    # Mounts and namespaces.
    *("mount", "umount", "umount2", "pivot_root", "setns"),
    # The kernel itself, its modules, its log, and reboot.
    *("kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module"),
    *("reboot", "syslog"),
    # Programs run by the kernel, and tracing.
    *("bpf", "perf_event_open", "userfaultfd", "fanotify_init"),
    # Kernel objects without a namespace, or that bypass paths.
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
# The others carry events of the whole machine, or load their module: 1, 2 and 3, 5, 6 and 7, 8 to
# 15, 16 to 31 (the maximum).
_OTHER_NETLINK = (
    *((_LOW_32, 1), (_LOW_32 - 1, 2), (_LOW_32, 5), (_LOW_32 - 1, 6)),
    *((_LOW_32 - 7, 8), (_LOW_32 - 15, 16)),
)
# Protocols of IP that are modules of their own: DCCP, SCTP, UDP-Lite, MPTCP (IANA's numbers, and
# in.h's). No other family has any of these.
_OTHER_PROTOCOLS = (33, 132, 136, 262)

# The calls that change a process's real id, to which the kernel charges epoll watches, pipes and
# passed descriptors (struct user_struct).  Their first argument is that id; for the first tuple,
# all bits set means "unchanged".
_REAL_ID_OR_NONE = ("setreuid", "setreuid32", "setresuid", "setresuid32")
_REAL_ID = ("setuid", "setuid32")
_HIGH_ID_BITS = [1 << bit for bit in range(16, 31)]
_TOP_BIT = 1 << 31
_LAST_ID = IDS_PER_SLOT - 1

# ioctl_tty(2): two inject input into a terminal as if it had been typed, one sets its line
# discipline, each of which is a module.
_TIOCSTI, _TIOCLINUX, _TIOCSETD = 0x5412, 0x541C, 0x5423


_LIBRARY = "libseccomp.so.2"
# seccomp.h: actions, attributes, comparisons and the non-native architectures.
_ALLOW, _ERRNO = 0x7FFF_0000, 0x0005_0000
_NO_NEW_PRIVS, _UNKNOWN = 3, -1
_OPERATIONS = {"SCMP_CMP_EQ": 4, "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}
_OTHER_ABIS = {"x86_64": (0x4000_0003, 0x4000_003E), "aarch64": (0x4000_0028,)}
_DOMAIN_ERROR = -errno.EDOM


@dataclass(frozen=True)
class Argument:
    """A condition on a call's argument ``index``; MASKED_EQ compares it after applying ``mask``."""

    index: int
    operation: str
    value: int
    mask: int = 0


@dataclass(frozen=True)
class Rule:
    """A call that fails with ``error`` if all conditions on its arguments hold."""

    name: str
    error: int
    arguments: tuple[Argument, ...] = ()

    def line(self) -> str:
        """The rule in an LXC profile."""
        conditions = "".join(map(_condition, self.arguments))
        return f"{self.name} errno {self.error}" + (f" {conditions}" if conditions else "")


def _condition(argument: Argument) -> str:
    # LXC expects the mask last, libseccomp first.
    mask = f",{argument.mask}" if argument.operation == "SCMP_CMP_MASKED_EQ" else ""
    return f"[{argument.index},{argument.value},{argument.operation}{mask}]"


def rules() -> Iterator[Rule]:
    """Everything that is denied."""
    # umount(2) with MNT_FORCE (LXC's reject_force_umount) is covered, as all of umount is denied.
    yield from (Rule(name, errno.ENOSYS) for name in _UNIMPLEMENTED)
    yield from (Rule(name, errno.EPERM) for name in _FORBIDDEN)
    for call in ("clone", "unshare"):
        yield from (_deny_masked(call, 0, flag, flag) for flag in _NAMESPACE_FLAGS.values())
    yield _deny_masked("unshare", 0, _CLONE_NEWTIME, _CLONE_NEWTIME)
    # Higher ids are shared by all containers (HIGH_IDS): their usage would be counted together.
    above_last_id = (Argument(0, "SCMP_CMP_GT", _LAST_ID),)
    yield from (Rule(call, errno.EINVAL, above_last_id) for call in _REAL_ID)
    for call in _REAL_ID_OR_NONE:
        yield from (
            _deny_masked(call, 0, _TOP_BIT | bit, bit, errno.EINVAL) for bit in _HIGH_ID_BITS
        )
    # The kernel uses 32 bits of these; comparing all 64 would let a higher bit bypass the rule.
    terminals = (_TIOCSTI, _TIOCLINUX, _TIOCSETD)
    yield from (_deny_masked("ioctl", 1, _LOW_32, ioctl) for ioctl in terminals)
    yield from _socket_rules()


def _socket_rules() -> Iterator[Rule]:
    # For i386, libseccomp also denies socketcall(2) for these, whose arguments are in memory:
    # programs have not used it since 2016.
    for mask, value in _OTHER_FAMILIES:
        yield _deny_masked("socket", 0, mask, value, errno.EAFNOSUPPORT)
    yield Rule("socket", errno.EAFNOSUPPORT, (Argument(0, "SCMP_CMP_GT", _LAST_FAMILY),))
    for protocol in _OTHER_PROTOCOLS:
        yield _deny_masked("socket", 2, _LOW_32, protocol, errno.EPROTONOSUPPORT)
    for mask, value in _OTHER_NETLINK:
        conditions = (_masked(0, _LOW_32, _LAST_FAMILY), _masked(2, mask, value))
        yield Rule("socket", errno.EPROTONOSUPPORT, conditions)
    # It creates a socket of the family, loading its module, before it finds that the family has no
    # pairs: only AF_UNIX is useful.
    yield Rule("socketpair", errno.EAFNOSUPPORT, (Argument(0, "SCMP_CMP_GT", _UNIX_FAMILY),))


def _deny_masked(name: str, argument: int, mask: int, value: int, error: int = errno.EPERM) -> Rule:
    """Deny when ``argument & mask == value``."""
    return Rule(name, error, (_masked(argument, mask, value),))


def _masked(argument: int, mask: int, value: int) -> Argument:
    return Argument(argument, "SCMP_CMP_MASKED_EQ", value, mask)


# As LXC's profile -------------------------------------------------------------------------


@cache
def profile() -> str:
    """The profile as the text of a file."""
    return "\n".join(["2", "denylist", "[all]", *(rule.line() for rule in rules()), ""])


def write_profile(directory: Path) -> Path:
    """Write the profile to a file in ``directory``, if it is not there.  Raises OSError.

    It is named after its content, as LXC may read it again while the container is running.
    """
    text = profile().encode()
    path = directory / f"seccomp-{zlib.crc32(text):08x}"
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
        return _reject_unknown_calls() + _export(library, context)
    finally:
        library.seccomp_release(context)


def _add(library: ctypes.CDLL, context: ctypes.c_void_p, rule: Rule) -> None:
    number = library.seccomp_syscall_resolve_name(rule.name.encode())
    if number == _UNKNOWN:
        return
    count = len(rule.arguments)
    comparisons = (_Comparison * max(count, 1))()
    for position, argument in enumerate(rule.arguments):
        pair = (
            (argument.mask, argument.value)
            if argument.operation == "SCMP_CMP_MASKED_EQ"
            else (argument.value, 0)
        )
        comparisons[position] = _Comparison(argument.index, _OPERATIONS[argument.operation], *pair)
    action = _ERRNO | rule.error
    result = library.seccomp_rule_add_array(context, action, number, count, comparisons)
    # EDOM: none of the architectures has the call.
    _check(0 if result == _DOMAIN_ERROR else result)


def _reject_unknown_calls() -> bytes:
    """Classic BPF to run before libseccomp's program (bpf_common.h, filter.h).

    Loads the call's number, the first word of struct seccomp_data; rejects it if it is above the
    last known one, or in the unnamed range.  x32's numbers are all above.
    """
    if platform.machine() != "x86_64":
        # arm has private calls far above (ARM_NR_BASE), which programs need.
        return b""
    load, greater, at_least, result = 0x20, 0x25, 0x35, 0x06
    first, last = _UNNAMED_RANGE
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


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    descriptor = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        _check(library.seccomp_export_bpf(context, descriptor))
        file.seek(0)
        return file.read()


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {os.strerror(-result)}")
