"""Attacks on what the kernel counts for the host's root, who made every container's namespace."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hostruntime.answers import SandboxInfo
from hostruntime.client import HostClient
from hostruntime.errors import NotFound
from tests.host.agent import eventually
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

# As many users as it takes to reach a limit that is all of theirs: each has its own as well.
_HOARD = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
real_time = signal.SIGRTMIN + 1
signal.pthread_sigmask(signal.SIG_BLOCK, [real_time])
for user in range(3):
    told, tell = os.pipe()
    if os.fork() == 0:
        os.setresuid(user, user, user)
        signals = queues = 0
        while libc.sigqueue(os.getpid(), real_time, None) == 0:
            signals += 1
        name = lambda: b"/%d-%d" % (user, queues)
        while libc.mq_open(name(), os.O_CREAT | os.O_RDWR, 0o600, None) >= 0:
            queues += 1
        os.write(tell, b"%d %d\\n" % (signals, queues))
        time.sleep(600)
    os.write(1, os.read(told, 100))
open("/workspace/hoarded", "w").close()
time.sleep(600)
"""
_USE = """
import ctypes, os, signal
libc = ctypes.CDLL(None, use_errno=True)
real_time = signal.SIGRTMIN + 1
signal.pthread_sigmask(signal.SIG_BLOCK, [real_time])
name = b"/orkestr-test-%d" % os.getpid()
timer = ctypes.c_void_p()
done = [
    libc.sigqueue(os.getpid(), real_time, None),
    libc.timer_create(1, None, ctypes.byref(timer)),
    min(0, libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None)),
]
libc.mq_unlink(name)
print(done)
"""


def what_root_can_do() -> str:
    done = subprocess.run([sys.executable, "-c", _USE], capture_output=True, text=True, timeout=30)
    return done.stdout.strip()


@pytest.fixture
def hostile(new_sandbox: NewSandbox, attackers: str) -> SandboxInfo:
    return new_sandbox(image=attackers, network="off")


def test_signals_and_queues_hoarded_inside_leave_the_hosts_root_its_own(
    host: HostClient, hostile: SandboxInfo
) -> None:
    assert what_root_can_do() == "[0, 0, 0]", "it works at all"
    with ThreadPoolExecutor(1) as pool:
        argv = ["python3", "-c", _HOARD]
        hoarding = pool.submit(host.exec, hostile.id, argv, timeout_seconds=60)
        for _ in eventually(50):
            try:
                host.read_path(hostile.id, "/workspace/hoarded")
                break
            except NotFound:
                assert not hoarding.done(), hoarding.result()
        can_do = what_root_can_do()
        host.delete_sandbox(hostile.id)
    assert can_do == "[0, 0, 0]"
