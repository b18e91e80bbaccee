"""Attacks by system call: namespaces, mounts, the kernel itself, keys, sockets, terminals."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import pty
import signal
import socket
import struct
import tempfile
import termios
from functools import partial
from pathlib import Path

from tests.host.attacks.harness import HELD, Held, Table, check, libc, main, number, syscall

TABLE = Table()

MOUNT, UMOUNT2 = number(165, 40), number(166, 39)
UNSHARE, CLONE, CLONE3, SETNS = number(272, 97), number(56, 220), 435, number(308, 268)
MS_RDONLY, MS_REMOUNT, MS_BIND = 0x1, 0x20, 0x1000
NAMESPACES = {
    "mount": 0x0002_0000,
    "cgroup": 0x0200_0000,
    "uts": 0x0400_0000,
    "ipc": 0x0800_0000,
    "user": 0x1000_0000,
    "pid": 0x2000_0000,
    "net": 0x4000_0000,
}


# Namespaces ---------------------------------------------------------------------------------


def clone(flags: int) -> None:
    pid = syscall(CLONE, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def unshare(flags: int) -> None:
    syscall(UNSHARE, flags)


for kind, flag in NAMESPACES.items():
    TABLE.add(f"unshare a {kind} namespace", partial(unshare, flag), "EPERM")
    TABLE.add(f"clone into a {kind} namespace", partial(clone, flag), "EPERM")
TABLE.add("unshare a time namespace", partial(unshare, 0x80), "EPERM")


@TABLE.attack("clone3 into a user namespace, where no filter sees the flags", "ENOSYS")
def _() -> None:
    clone(0)  # The control: to make a process is allowed.
    arguments = struct.pack("8Q", NAMESPACES["user"], 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    if syscall(CLONE3, arguments, len(arguments)) == 0:
        os._exit(0)


@TABLE.attack("unshare with a bit above the 32 that count", "EPERM")
def _() -> None:
    syscall(UNSHARE, NAMESPACES["user"] | 1 << 40)


def join(kind: str) -> None:
    with Path(f"/proc/1/ns/{kind}").open("rb") as namespace:
        syscall(SETNS, namespace.fileno(), 0)


for kind in ("mnt", "net", "pid", "uts", "ipc", "cgroup"):
    TABLE.add(f"setns to init's {kind} namespace", partial(join, kind), "EPERM")


# Mounts -------------------------------------------------------------------------------------


def mount(kind: str, source: str = "none", flags: int = 0, data: bytes = b"") -> None:
    target = tempfile.mkdtemp(dir="/root")
    syscall(MOUNT, source.encode(), target.encode(), kind.encode(), flags, data)


def remount(path: str) -> None:
    assert Path(path).is_dir()
    syscall(MOUNT, b"none", path.encode(), b"", MS_REMOUNT | MS_BIND, b"")


for kind in ("proc", "sysfs", "tmpfs", "devtmpfs", "cgroup", "cgroup2", "mqueue", "debugfs"):
    TABLE.add(f"mount {kind}", partial(mount, kind), "EPERM")
TABLE.add("mount the disk", partial(mount, "ext4", "/dev/sda"), "EPERM")
TABLE.add("bind the root elsewhere", partial(mount, "", "/", MS_BIND), "EPERM")
TABLE.add("bind over a masked path", partial(mount, "", "/proc", MS_BIND), "EPERM")
for path in ("/", "/proc/sys", "/sys"):
    TABLE.add(f"remount {path} writable", partial(remount, path), "EPERM")


@TABLE.attack("mount an overlay of the root", "EPERM")
def _() -> None:
    places = [tempfile.mkdtemp(dir="/workspace") for _ in range(2)]
    mount("overlay", data=f"lowerdir=/,upperdir={places[0]},workdir={places[1]}".encode())


# Whatever else there is to expect where no i386 code can run.
ELSEWHERE = () if platform.machine() == "x86_64" else (HELD,)


def i386(call: int, first: int, words: bytes = b"") -> None:
    """Make a system call as an i386 program would, by software interrupt."""
    if ELSEWHERE:
        raise Held("this machine runs no i386 code")
    low = 0x40  # MAP_32BIT: i386 pointers have to reach the words
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | low
    page = mmap.mmap(-1, 4096, flags, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    load = b"\xb8" + struct.pack("<I", call) + b"\xbb" + struct.pack("<I", first)
    code = b"\x53" + load + b"\xb9" + struct.pack("<I", address + 256) + b"\xcd\x80\x5b\xc3"
    page[: len(code)], page[256 : 256 + len(words)] = code, words
    result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    if result < 0:
        raise OSError(-result, os.strerror(-result))


@TABLE.attack("unshare a user namespace from the i386 side", "EPERM", *ELSEWHERE)
def _() -> None:
    i386(20, 0)  # The control: getpid.
    i386(310, NAMESPACES["user"])


@TABLE.attack("a vsock socket from the i386 side", "EAFNOSUPPORT", *ELSEWHERE)
def _() -> None:
    i386(359, 40)


@TABLE.attack("a vsock socket by i386's socketcall", "EAFNOSUPPORT", *ELSEWHERE)
def _() -> None:
    i386(102, 1, struct.pack("<3I", 40, 1, 0))


@TABLE.attack("unshare by its x32 number", "EPERM", "ENOSYS")
def _() -> None:
    syscall(UNSHARE | 0x4000_0000, NAMESPACES["user"])


@TABLE.attack("unmount a masked path", "EPERM")
def _() -> None:
    syscall(UMOUNT2, b"/proc/kallsyms", 2)


@TABLE.attack("pivot_root", "EPERM")
def _() -> None:
    syscall(number(155, 41), b"/workspace", b"/workspace")


TABLE.add("fsopen", partial(syscall, 430, b"tmpfs", 0), "ENOSYS")
TABLE.add("open_tree, cloning", partial(syscall, 428, -100, b"/", 1), "ENOSYS")
TABLE.add("move_mount", partial(syscall, 429, -100, b"/tmp", -100, b"/mnt", 0), "ENOSYS")
TABLE.add("fspick", partial(syscall, 433, -100, b"/", 0), "ENOSYS")


@TABLE.attack("mount_setattr", "ENOSYS")
def _() -> None:
    syscall(442, -100, b"/", 0, struct.pack("4Q", 0, MS_RDONLY, 0, 0), 32)


@TABLE.attack("chroot twice, to climb out by a descriptor")
def _() -> None:
    before = os.stat("/")
    outside = os.open("/", os.O_RDONLY)
    os.chroot(tempfile.mkdtemp(dir="/workspace"))
    os.fchdir(outside)
    for _step in range(64):
        os.chdir("..")
    os.chroot(".")
    after = os.stat("/")
    assert os.path.exists("/.orkestr/init")
    if os.path.samestat(before, after):
        raise Held("it climbed to the container's own root, and no further")


# The kernel and the machine -----------------------------------------------------------------


def with_file(call: int, *rest: object) -> None:
    """A call on a file of the attacker's own, whose path is the first argument."""
    with tempfile.NamedTemporaryFile(dir="/workspace") as file:
        file.write(bytes(8192))
        file.flush()
        syscall(call, file.name.encode(), *rest)


def with_descriptor(call: int, *rest: object) -> None:
    with tempfile.NamedTemporaryFile(dir="/workspace") as file:
        syscall(call, file.fileno(), *rest)


CALLS: dict[str, tuple[int, tuple[object, ...]]] = {
    "kexec_load": (number(246, 104), (0, 0, 0, 0)),
    "kexec_file_load": (number(320, 294), (-1, -1, 0, b"", 0)),
    "init_module": (number(175, 105), (b"\x7fELF", 4, b"")),
    "delete_module": (number(176, 106), (b"dummy", 0)),
    "read the kernel log (syslog)": (number(103, 116), (3, bytes(4096), 4096)),
    "turn Ctrl-Alt-Del on (reboot)": (
        number(169, 142),
        (0xFEE1DEAD - (1 << 32), 672274793, 0x89ABCDEF - (1 << 32)),
    ),
    "restart the machine (reboot)": (
        number(169, 142),
        (0xFEE1DEAD - (1 << 32), 672274793, 0x01234567),
    ),
    "quotactl": (number(179, 60), (0x8000_0100, b"/dev/vda", 0, 0)),
    "stop process accounting (acct)": (number(163, 89), (0,)),
    "settimeofday": (number(164, 170), (struct.pack("2q", 0, 0), 0)),
    "clock_settime": (number(227, 112), (0, struct.pack("2q", 0, 0))),
    "vhangup": (number(153, 58), ()),
    "sethostname": (number(170, 161), (b"owned", 5)),
    "setdomainname": (number(171, 162), (b"owned", 5)),
    "userfaultfd": (number(323, 282), (1,)),
    "fanotify_init": (number(300, 262), (0, 0)),
}
for name, (call, arguments) in CALLS.items():
    TABLE.add(name, partial(syscall, call, *arguments), "EPERM")
if number(172, None) != -1:
    TABLE.add("iopl", partial(syscall, 172, 3), "EPERM")
    TABLE.add("ioperm", partial(syscall, 173, 0x70, 1, 1), "EPERM")
TABLE.add("finit_module", partial(with_descriptor, number(313, 273), b"", 0), "EPERM")
TABLE.add("quotactl_fd", partial(with_descriptor, 443, 0x8000_0100, 0, 0), "EPERM")
TABLE.add("swapon", partial(with_file, number(167, 224), 0), "EPERM")
TABLE.add("swapoff", partial(with_file, number(168, 225)), "EPERM")
TABLE.add("have the kernel write accounts (acct)", partial(with_file, number(163, 89)), "EPERM")


@TABLE.attack("slow the clock down (adjtimex)", "EPERM")
def _() -> None:
    buffer = bytearray(256)
    struct.pack_into("=I4xq", buffer, 0, 0x4000, 9000)  # ADJ_TICK would be 0x4000
    view = (ctypes.c_char * 256).from_buffer(buffer)
    check(libc.adjtimex(view))


@TABLE.attack("load a BPF program", "EPERM")
def _() -> None:
    code = struct.pack("<Q", 0x0000_0000_0000_00B7) + struct.pack("<Q", 0x95)
    program, licence = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "<IIQQ", 1, 2, ctypes.addressof(program), ctypes.addressof(licence)
    ) + bytes(96)
    syscall(number(321, 280), 5, attributes, len(attributes))


@TABLE.attack("perf_event_open on itself", "EPERM")
def _() -> None:
    attributes = struct.pack("<IIQQQQQ", 1, 112, 0, 0, 0, 0, 0x61) + bytes(64)
    syscall(number(298, 241), attributes, 0, -1, -1, 0)


@TABLE.attack("open_by_handle_at with the root's handle", "EPERM")
def _() -> None:
    handle, mount_id = ctypes.create_string_buffer(136), ctypes.c_int()
    ctypes.c_uint.from_buffer(handle).value = 8
    struct.pack_into("<Ii", handle, 0, 8, 1)
    struct.pack_into("<II", handle, 8, 2, 0)
    assert mount_id.value == 0
    with Path("/").resolve().joinpath("etc/passwd").open("rb") as file:
        syscall(number(304, 265), file.fileno(), handle, 0)


@TABLE.attack("io_uring_setup", "ENOSYS")
def _() -> None:
    syscall(425, 4, bytearray(120) and ctypes.create_string_buffer(120))


TABLE.add("memfd_secret", partial(syscall, 447, 0), "ENOSYS")


# Keys ---------------------------------------------------------------------------------------

ADD_KEY, REQUEST_KEY, KEYCTL = number(248, 217), number(249, 218), number(250, 219)
SESSION, USER_SESSION = -3, -5
TABLE.add("add_key", partial(syscall, ADD_KEY, b"user", b"k", b"v", 1, SESSION), "EPERM")
TABLE.add("request_key", partial(syscall, REQUEST_KEY, b"user", b"k", b"", SESSION), "EPERM")
TABLE.add("take up a user's keys (keyctl)", partial(syscall, KEYCTL, 0, USER_SESSION, 1), "EPERM")
TABLE.add("describe a key by number (keyctl)", partial(syscall, KEYCTL, 6, 1, 0, 0), "EPERM")


# Sockets ------------------------------------------------------------------------------------


def open_socket(family: int, kind: int, protocol: int = 0) -> None:
    socket.socketpair()  # The control: the families that are used still work.
    for usual in (socket.AF_INET, socket.AF_INET6):
        socket.socket(usual, socket.SOCK_STREAM).close()
    syscall(number(41, 198), family, kind, protocol)


FAMILIES = {
    "packet": (socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
    "vsock": (40, socket.SOCK_STREAM, 0),
    "alg": (38, socket.SOCK_SEQPACKET, 0),
    "key": (15, socket.SOCK_RAW, 2),
    "can": (29, socket.SOCK_RAW, 1),
    "bluetooth": (31, socket.SOCK_RAW, 1),
    "tipc": (30, socket.SOCK_RDM, 0),
    "rxrpc": (33, socket.SOCK_DGRAM, 2),
    "xdp": (44, socket.SOCK_RAW, 0),
    "smc": (43, socket.SOCK_STREAM, 0),
    "ax25": (3, socket.SOCK_DGRAM, 0),
    "appletalk": (5, socket.SOCK_DGRAM, 0),
    "x25": (9, socket.SOCK_SEQPACKET, 0),
}
for name, (family, kind_of_socket, protocol) in FAMILIES.items():
    attempt = partial(open_socket, family, kind_of_socket, protocol)
    TABLE.add(f"a socket of family {name}", attempt, "EAFNOSUPPORT")
PROTOCOLS = {
    "DCCP": (socket.AF_INET, 6, 33),
    "SCTP": (socket.AF_INET, socket.SOCK_STREAM, 132),
    "UDP-Lite": (socket.AF_INET, socket.SOCK_DGRAM, 136),
    "MPTCP": (socket.AF_INET6, socket.SOCK_STREAM, 262),
    "netlink XFRM": (socket.AF_NETLINK, socket.SOCK_RAW, 6),
    "netlink NETFILTER": (socket.AF_NETLINK, socket.SOCK_RAW, 12),
    "netlink KOBJECT_UEVENT, with everybody's events": (
        *(socket.AF_NETLINK, socket.SOCK_DGRAM),
        15,
    ),
    "netlink GENERIC": (socket.AF_NETLINK, socket.SOCK_RAW, 16),
}
for name, arguments in PROTOCOLS.items():
    TABLE.add(f"a socket of {name}", partial(open_socket, *arguments), "EPROTONOSUPPORT")
TABLE.add("a raw IPv4 socket", partial(open_socket, 2, 3, 1), "EPERM")
TABLE.add("a raw IPv6 socket", partial(open_socket, 10, 3, 58), "EPERM")


@TABLE.attack("change the network from inside (netlink)", "EPERM")
def _() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        # RTM_NEWLINK for lo, setting it down.
        body = struct.pack("=BxHiII", 0, 0, 1, 0, 1)
        netlink.send(struct.pack("=IHHII", 16 + len(body), 16, 5, 1, 0) + body)
        answer = netlink.recv(4096)
    error = -struct.unpack_from("=i", answer, 16)[0]
    if error:
        raise OSError(error, os.strerror(error))


# Terminals ----------------------------------------------------------------------------------


def type_into_terminal(request: int) -> None:
    primary, terminal = pty.openpty()
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    assert os.isatty(terminal)
    assert primary > 0
    check(libc.ioctl(terminal, ctypes.c_ulong(request), ctypes.c_char_p(b"x")))


TABLE.add("put words into a terminal (TIOCSTI)", partial(type_into_terminal, 0x5412), "EPERM")
TABLE.add("TIOCSTI with a bit above", partial(type_into_terminal, 0x1_0000_5412), "EPERM")
TABLE.add("TIOCLINUX", partial(type_into_terminal, 0x541C), "EPERM")
TABLE.add("another line discipline (TIOCSETD)", partial(type_into_terminal, 0x5423), "EPERM")


@TABLE.attack("take the machine's asynchronous requests (io_setup)", "ENOSYS")
def _() -> None:
    context = ctypes.c_ulong(0)
    syscall(number(206, 0), 65_536, ctypes.addressof(context))


def unknown_call(which: int) -> None:
    syscall(which, 0, 0, 0, 0, 0, 0)


for which in (457, 458, 461, 467, 468, 500):
    TABLE.add(f"call {which}, which nobody has looked at", partial(unknown_call, which), "ENOSYS")


@TABLE.attack("have page zero mapped (personality)")
def _() -> None:
    syscall(number(135, 92), 0x0010_0000)
    out, into = os.pipe()
    if os.fork() == 0:
        os.dup2(into, 1)
        os.execv("/usr/bin/cat", ["cat", "/proc/self/maps"])
    os.close(into)
    with open(out) as maps:
        text = maps.read()
    assert "/cat" in text
    if not text.startswith("00000000-"):
        raise Held(f"the lowest mapping is {text.split('-')[0]}")


if __name__ == "__main__":
    main(TABLE)
