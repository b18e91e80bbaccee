"""What others who have an account on this machine can get at: nothing of any tenant's.

Everything the installation has written is walked from the top, as `nobody` and as the users of the
proxy, of PostgreSQL and of the web, each of whom tries what it could do with every name it reaches.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from orkestr import Sandbox

from hostruntime.container.cgroups import cgroup_layout, pids_under
from hostruntime.host.rundir import RUN_ROOT
from tests.clients.making import Sandboxes, Templates
from tests.host.agent import container_of
from tests.processes import command_lines
from tests.stack import Stack, wait_for

SECRET = "a-tenants-own-words"
USERS = ("nobody", "proxy", "postgres", "orkestr")
# The machine's own Python: a user has no business in root's.
PYTHON = "/usr/bin/python3"
# Reads a path a line, and answers with what may be done there: list or read, write, pass through
# or execute; for a socket, connect.
PROBE = """
import json, os, pwd, socket, stat, sys
entry = pwd.getpwnam(sys.argv[1])
os.setgroups(os.getgrouplist(sys.argv[1], entry.pw_gid))
os.setgid(entry.pw_gid)
os.setuid(entry.pw_uid)

def attempt(action):
    try:
        action()
    except PermissionError:
        return False
    except OSError as error:
        return str(error)
    return True

def connects(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)

for line in sys.stdin:
    path = json.loads(line)
    can = ""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        mode = 0
    if stat.S_ISDIR(mode):
        can += "r" if attempt(lambda: os.listdir(path)) is True else ""
        can += "w" if os.access(path, os.W_OK) else ""
        can += "x" if attempt(lambda: os.stat(path + "/.")) is True else ""
    elif stat.S_ISSOCK(mode):
        can += "c" if attempt(lambda: connects(path)) is not False else ""
    elif stat.S_ISREG(mode):
        for letter, flag in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
            can += letter if attempt(lambda: os.close(os.open(path, flag))) is True else ""
    elif mode and not stat.S_ISLNK(mode):
        can += "r" if os.access(path, os.R_OK) else ""
        can += "w" if os.access(path, os.W_OK) else ""
    print(json.dumps(can), flush=True)
"""


@dataclass
class Intruder:
    """A process of another user, told by root what there is to try."""

    process: subprocess.Popen[str]

    def ask(self, path: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(path) + "\n")
        self.process.stdin.flush()
        return str(json.loads(self.process.stdout.readline()))

    def walk(self, top: Path) -> dict[str, str]:
        """All that can be done to something at ``top`` or below, by path."""
        found, waiting = {}, [str(top)]
        while waiting:
            path = waiting.pop()
            if can := self.ask(path):
                found[path] = can
            if "x" in can and stat.S_ISDIR(os.lstat(path).st_mode):
                waiting += map(str, Path(path).iterdir())
        return found


@contextmanager
def intruding(user: str) -> Iterator[Intruder]:
    with subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", PROBE, user],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Intruder(process)
        assert process.stdin is not None
        process.stdin.close()


@dataclass(frozen=True)
class Busy:
    """An installation at work: what runs in it, and its run directory."""

    stack: Stack
    run: Path
    sandbox: Sandbox
    build: str

    @property
    def var(self) -> Path:
        return self.stack.layout.var

    @property
    def anybodys(self) -> dict[str, str]:
        """What every user of the machine may do: pass through, and read two words of ours."""
        passed = [self.var, self.var / "run", RUN_ROOT, self.run, self.run / "lxc"]
        return {
            **dict.fromkeys(map(str, [*passed, self.run / "roots"]), "x"),
            str(self.var / "run/supervisord.pid"): "r",
            str(self.stack.layout.ready): "r",
            # The suite's own.
            str(self.stack.output): "r",
        }


@pytest.fixture
def busy(stack: Stack, templates: Templates, sandboxes: Sandboxes) -> Busy:
    """Two sandboxes, one of them paused, a snapshot and a template, and a build under way."""
    written = f"echo {SECRET} > /root/open && chmod -R a+rwX /root && mkfifo -m 666 /root/fifo"
    made = templates.ready("debian-12", written)
    sandbox, paused = (sandboxes.boot(made) for _ in range(2))
    for one in (sandbox, paused):
        one.exec(f"{written.replace('open', 'other')}; echo {SECRET} > /workspace/open")
    sandbox.snapshot()
    paused.pause()
    with stack.host() as host:
        run = RUN_ROOT / str(host.health().instance)
    templates.create("debian-12", f"{written}; sleep 600")

    def written_by_builds() -> list[Path]:
        return list(run.glob("disks/img_*/upper/root/fifo"))

    wait_for(lambda: bool(written_by_builds()), 60, stack.explain)
    return Busy(stack, run, sandbox, written_by_builds()[0].parts[-4])


def own(user: str, busy: Busy) -> dict[str, str | None]:
    """What a user may do besides; None for everything at and below."""
    var = busy.var
    everybodys: dict[str, dict[str, str | None]] = {
        "nobody": {},
        "proxy": {str(busy.run / "egress"): None},
        "postgres": {str(var / "pg"): None, str(var / "run/pg"): None},
        "orkestr": {
            str(var / "run/host.sock"): "c",
            str(var / "run/host.sock.ports"): "c",
            # Audit entries that are not in the database yet.
            str(var / "run/audit"): None,
            str(var / "run/secret_key"): "rw",
            str(var / "run/token_pepper"): "rw",
            str(var / "run/pg"): "x",
            str(var / "run/pg/.s.PGSQL.5432"): "c",
        },
    }
    return everybodys[user]


@pytest.mark.parametrize("user", USERS)
def test_another_user_reaches_only_what_it_needs(user: str, busy: Busy) -> None:
    with intruding(user) as intruder:
        found = intruder.walk(busy.var)
        for top in (RUN_ROOT, *RUN_ROOT.glob("instances"), busy.run):
            found |= {str(top): can} if (can := intruder.ask(str(top))) else {}
        for top in (RUN_ROOT / "instances", busy.run):
            found |= intruder.walk(top)
    allowed = busy.anybodys | own(user, busy)
    whole = [path for path, can in allowed.items() if can is None]
    # The style sheets and scripts of the pages.
    whole.append(str(busy.var / "static"))
    strange = {
        path: can
        for path, can in found.items()
        if allowed.get(path) != can and not any(Path(path).is_relative_to(one) for one in whole)
    }
    assert strange == {}
    # It went there at all, and found what it may.
    assert {path: found.get(path) for path in busy.anybodys} == busy.anybodys
    assert {path for path in own(user, busy) if path not in found} == set()


def test_a_tenants_disks_devices_and_processes_are_closed(busy: Busy) -> None:
    state = busy.stack.layout.state_dir
    mounts = [f"disks/{busy.sandbox.id}/upper/root/other", f"disks/{busy.build}/upper/root/open"]
    planted = [busy.run / name for name in mounts]
    images = sorted(state.glob("images/img_*/tree/root/open"))
    for path in (*planted, *images):
        assert path.read_text() == f"{SECRET}\n", "there is something to be read"
    roots = list((busy.run / "roots").glob("*/merged"))
    assert len(roots) >= 3
    assert [path for root in roots for path in root.iterdir()] == [], "mounted for nobody here"
    assert images
    ours = [pid for pid, line in command_lines().items() if str(state) in line]
    group = cgroup_layout().container(container_of(state, busy.sandbox.id)).unified
    tenants = pids_under(group)
    assert ours
    assert tenants
    inside = [
        f"/proc/{pid}/{name}"
        for pid in (*ours, *tenants)
        for name in ("root/", "cwd/", "environ", "mem", "fd/")
    ]
    devices = [str(path) for path in Path("/dev").glob("loop[0-9]*")]
    assert devices
    paths = [*map(str, (*planted, *images)), *inside, *devices]
    for user in ("nobody", "proxy", "postgres"):
        with intruding(user) as intruder:
            assert {path: can for path in paths if (can := intruder.ask(path))} == {}


def test_no_other_user_can_hold_our_locks(busy: Busy) -> None:
    locks = [RUN_ROOT / "instances/.lock", busy.stack.layout.lock]
    assert all(lock.exists() for lock in locks)
    # Liblxc's own, of containers at work, if it leaves any.
    locks += Path("/run/lxc/lock", *busy.run.parts[1:]).rglob(".*")
    for user in USERS:
        with intruding(user) as intruder:
            assert {intruder.ask(str(lock)) for lock in locks} == {""}
