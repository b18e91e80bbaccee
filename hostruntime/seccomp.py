"""The system calls a container may not make: the seccomp profile, in LXC's own format.

A deny list of LXC's second version (lxc.container.conf(5), ``lxc.seccomp.profile``): LXC turns it
into one filter for every ABI the processor runs (on x86-64 also i386 and x32, on arm64 also arm),
installs it before init is executed, and again in every attached process.  Names that an
architecture or an older libseccomp does not know are passed over.

The container's user namespace already takes most of the power from these calls.  Denying them
keeps the code behind them, which is where the kernel's holes have been, out of reach altogether.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hostruntime.paths import write_atomically

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
)

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
_LAST_FAMILY = 16

# ioctl_tty(2): both put input into a terminal as if it had been typed.
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


@cache
def profile() -> str:
    """The profile, as the text of a file."""
    return "\n".join(["2", "denylist", "[all]", *_rules(), ""])


def profile_in(directory: Path) -> Path:
    """The profile as a file in ``directory``, written there once.  Raises OSError.

    It is named after its content: LXC reads it again for each attached process, so a container
    started by an older version keeps the profile it was started with.
    """
    text = profile().encode()
    path = directory / f"seccomp-{hashlib.sha256(text).hexdigest()[:16]}"
    if not path.exists():
        write_atomically(path, text)
    return path


def _rules() -> Iterator[str]:
    # umount(2) with MNT_FORCE, LXC's reject_force_umount, goes with all of umount.
    yield from (_denied(name, errno.ENOSYS) for name in _ABSENT)
    yield from (_denied(name, errno.EPERM) for name in _FORBIDDEN)
    for call in ("clone", "unshare"):
        yield from (_denied_bits(call, 0, flag, flag) for flag in _NAMESPACE_FLAGS.values())
    yield _denied_bits("unshare", 0, _CLONE_NEWTIME, _CLONE_NEWTIME)
    # The kernel looks at 32 bits of these; with all 64 compared, a bit above would get it through.
    yield from (_denied_bits("ioctl", 1, _LOW_32, what) for what in (_TIOCSTI, _TIOCLINUX))
    yield from _sockets()


def _sockets() -> Iterator[str]:
    for mask, value in _OTHER_FAMILIES:
        yield _denied_bits("socket", 0, mask, value, errno.EAFNOSUPPORT)
    yield f"socket errno {errno.EAFNOSUPPORT} [0,{_LAST_FAMILY},SCMP_CMP_GT]"
    # i386 programs of before 2016 made sockets by socketcall(2), whose arguments are in memory.
    yield "[x86]"
    yield f"socketcall errno {errno.ENOSYS} [0,1,SCMP_CMP_EQ]"


def _denied(name: str, error: int) -> str:
    return f"{name} errno {error}"


def _denied_bits(name: str, argument: int, mask: int, value: int, error: int = errno.EPERM) -> str:
    """Deny when ``argument & mask == value``; LXC writes the mask last, libseccomp first."""
    return f"{name} errno {error} [{argument},{value},SCMP_CMP_MASKED_EQ,{mask}]"
