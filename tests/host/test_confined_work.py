"""What people need still works inside, for all that is denied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent
from tests.host.client import HostClient

pytestmark = pytest.mark.host

SHELL = {
    "pipes and redirections": "echo a | tr a b > /tmp/x && grep -q b /tmp/x",
    "su to another user": "su -s /bin/sh nobody -c 'id -un' | grep -qx nobody",
    "setpriv": "setpriv --reuid=65534 --regid=65534 --clear-groups id -u | grep -qx 65534",
    "setpriv to fewer capabilities": "setpriv --bounding-set -all true",
    "a set-user-id program": "cp /usr/bin/id /root/sid && chmod 755 /root && chown 33 /root/sid && "
    "chmod u+s /root/sid && /root/sid | grep -q 'euid=33'",
    "chown, chgrp, chmod": "touch /root/f && chown 33:33 /root/f && chmod 4750 /root/f && "
    "[ $(stat -c %u:%a /root/f) = 33:4750 ]",
    "chroot": "chroot / /bin/true",
    "useradd": "useradd -m worker && su worker -c 'cd && touch mine' && userdel -r worker",
    "dpkg reads and configures": "dpkg -l | grep -q coreutils && dpkg --configure -a",
    "dpkg installs": "mkdir -p /tmp/p/DEBIAN /tmp/p/opt && echo 1 > /tmp/p/opt/it && printf "
    "'Package: it\\nVersion: 1\\nArchitecture: all\\nMaintainer: x <x@y>\\nDescription: x\\n' "
    "> /tmp/p/DEBIAN/control && dpkg-deb -b /tmp/p /tmp/it.deb && dpkg -i /tmp/it.deb "
    "&& [ -f /opt/it ]",
    "apt's own user": "su -s /bin/sh _apt -c true",
    "tar keeps owners": "cd /tmp && touch t && chown 5:5 t && tar cf t.tar t && rm t && "
    "tar xpf t.tar && [ $(stat -c %u t) = 5 ]",
    "mkfifo": "mkfifo /tmp/p1 && (echo x > /tmp/p1 &) && grep -q x /tmp/p1",
    "flock": "flock /tmp/lock true",
    "nice and timeout": "nice -n 5 timeout 5 true",
    "a pseudo-terminal": "script -qc 'tty' /dev/null | grep -q /dev/pts",
    "perl": "perl -e 'print 1' | grep -q 1",
    "process listings": "cat /proc/meminfo /proc/cpuinfo /proc/stat /proc/loadavg > /dev/null",
    "a session of its own": "setsid true",
    "unshare, of no namespace": "python3 -c 'import ctypes; exit(ctypes.CDLL(None).unshare(512))'",
    "the clock is read": "date +%s | grep -q ^1",
}
PYTHON = {
    "subprocess": "import subprocess; assert subprocess.check_output(['echo', 'x']) == b'x\\n'",
    "threads": "import threading as t; s = [t.Thread(target=print) for _ in range(9)]\n"
    "for x in s: x.start()\nfor x in s: x.join()",
    "multiprocessing with locks": "import multiprocessing as m\nwith m.Pool(2) as p: "
    "assert p.map(abs, [-1, -2]) == [1, 2]\nm.Lock(); m.Queue(); m.Semaphore()",
    "fork": "import os\nif os.fork() == 0: os._exit(3)\nassert os.wait()[1] == 3 << 8",
    "unix sockets": "import socket; a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1)",
    "abstract sockets": "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0mine')",
    "loopback": "import socket; s = socket.create_server(('127.0.0.1', 0)); "
    "socket.create_connection(s.getsockname())",
    "IPv6 loopback": "import socket; s = socket.create_server(('::1', 0), family=socket.AF_INET6)",
    "a port below 1024": "import socket; socket.create_server(('127.0.0.1', 80))",
    "netlink": "import socket; s = socket.socket(16, 3, 0); s.bind((0, 0))",
    "interfaces are listed": "import socket; assert socket.if_nameindex()",
    "ping's sockets": "import socket; socket.socket(2, 2, socket.IPPROTO_ICMP)",
    "epoll and eventfd": "import select, os; e = select.epoll(); e.register(os.eventfd(1), 1); "
    "assert e.poll(1)",
    "inotify": "import ctypes; c = ctypes.CDLL(None); f = c.inotify_init(); "
    "assert c.inotify_add_watch(f, b'/tmp', 256) > 0",
    "timerfd and signalfd": "import ctypes; c = ctypes.CDLL(None); "
    "assert c.timerfd_create(1, 0) > 0; assert c.signalfd(-1, bytes(128), 0) > 0",
    "memfd": "import os; f = os.memfd_create('x'); os.write(f, b'x')",
    "shared memory": "from multiprocessing import shared_memory as s; m = s.SharedMemory("
    "create=True, size=4096); m.unlink()",
    "mlock": "import ctypes, mmap; m = mmap.mmap(-1, 4096); "
    "assert ctypes.CDLL(None).mlock(ctypes.byref(ctypes.c_char.from_buffer(m)), 4096) == 0",
    "executable memory": "import mmap; mmap.mmap(-1, 4096, 34, 7)",
    "limits lowered": "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 64))",
    "tracing a child": "import os, ctypes, signal; c = ctypes.CDLL(None)\np = os.fork()\n"
    "if p == 0: c.ptrace(0, 0, 0, 0); os.kill(os.getpid(), signal.SIGSTOP); os._exit(0)\n"
    "assert os.WIFSTOPPED(os.waitpid(p, 0)[1]); assert c.ptrace(7, p, 0, 0) == 0; os.waitpid(p, 0)",
    "personality is asked for": "import ctypes; assert ctypes.CDLL(None).personality(-1) >= 0",
    "extended attributes": "import os; open('/root/x', 'w')\n"
    "os.setxattr('/root/x', 'user.a', b'1')",
    "programs that carry net_raw, as ping does": "import os, shutil, struct, subprocess\n"
    "shutil.copy('/usr/bin/true', '/root/ping')\n"
    "mark = struct.pack('<5I', 0x2000001, 1 << 13, 0, 0, 0)\n"
    "os.setxattr('/root/ping', 'security.capability', mark)\n"
    "subprocess.check_call(['/root/ping'])",
    "System V memory": "import ctypes; assert ctypes.CDLL(None).shmget(7, 4096, 0o1600) >= 0",
    "many small files": "import os\nfor n in range(5000): open(f'/workspace/{n}', 'w').close()",
    "sqlite": "import sqlite3; sqlite3.connect('/root/db').execute('create table t(a)')",
    "asyncio subprocesses": "import asyncio\nasync def f(): p = await asyncio."
    "create_subprocess_exec('true'); assert await p.wait() == 0\nasyncio.run(f())",
}


@pytest.fixture(scope="module")
def worker(agent: Agent, attackers: str) -> Iterator[tuple[HostClient, SandboxInfo]]:
    host = agent.client
    yield (
        host,
        host.create_sandbox(
            CreateSandbox("sbx_worker", image=attackers, cpu=2, memory_mb=512, network="open")
        ),
    )
    host.delete_sandbox("sbx_worker")


@pytest.mark.parametrize("what", SHELL)
def test_commands_work(worker: tuple[HostClient, SandboxInfo], what: str) -> None:
    host, sandbox = worker
    result = host.exec(sandbox.id, Exec(SHELL[what]))
    assert result.code == 0, (result.stdout, result.stderr)


@pytest.mark.parametrize("what", PYTHON)
def test_programs_work(worker: tuple[HostClient, SandboxInfo], what: str) -> None:
    host, sandbox = worker
    result = host.exec(sandbox.id, Exec(["python3", "-c", PYTHON[what]]))
    assert result.code == 0, result.stderr.decode()
