"""A noisy tenant and a disk that ends: the state directory is on a small file system of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container.cgroups import cgroup_layout, is_frozen, kill_group
from hostruntime.errors import ContainerPaused, Held, HostError, HostFull, HostUnavailable
from hostruntime.host import kernel
from hostruntime.host.paths import Instance
from hostruntime.host.rundir import RunDir
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.health import DiskStatus
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, eventually, groups_named, is_running, mounts_below
from tests.host.client import HostClient
from tests.host.small import IMAGE, a_small_agent

pytestmark = [pytest.mark.host]

MIB = 1024 * 1024
SIZE_MB = 1536
# At least a fifth of it is reserved on a disk that is not small (hostruntime.host.disk_space).
LEAST_MB = 5 * 1024
MOUNTED = "loop,errors=remount-ro"
# Goes on until it is stopped; each file is one write(2) after the other.  Paced to 50 MiB a second
# at most: a disk's cache takes what is between "short" and "all but gone" in a tenth of a second,
# and who is held in that time and who is ended depends on how soon a busy machine comes to look.
WRITES = """
import itertools, os, time
os.chdir("/var/tmp")
piece = os.urandom(1 << 20)
for number in itertools.count():
    with open(f"fill{number}", "wb") as file:
        for _ in range(64):
            file.write(piece)
            time.sleep(0.02)
"""
FLOODS = WRITES.replace("            time.sleep(0.02)\n", "")


@contextlib.contextmanager
def small_disk(where: Path, *options: str, size_mb: int = SIZE_MB) -> Iterator[Path]:
    """An ext4 of its own; where it is mounted."""
    image, mounted = where / "disk.img", where / "disk"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(size_mb * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", *options, str(image)], check=True)
    subprocess.run(["mount", "-o", MOUNTED, str(image), str(mounted)], check=True)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
        image.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path) as mounted:
        yield mounted


@pytest.fixture
def agent(disk: Path) -> Iterator[Agent]:
    with a_small_agent(disk / "state") as running:
        yield running
        assert mounts_below(disk) == []


@pytest.fixture
def host(agent: Agent) -> HostClient:
    return agent.client


def a_sandbox(host: HostClient, name: str) -> SandboxInfo:
    return host.create_sandbox(
        CreateSandbox(f"sbx_{name}", image=IMAGE, cpu=1, memory_mb=512, disk_mb=8192)
    )


def python(host: HostClient, sandbox: SandboxInfo, script: str) -> str:
    done = host.exec(sandbox.id, Exec(["python3", "-c", script], timeout_seconds=120))
    return (done.stdout + done.stderr).decode().strip()


class Writer(threading.Thread):
    """Runs a script in a sandbox until it ends; how it ended is in ``error``."""

    def __init__(self, agent: Agent, sandbox: SandboxInfo, script: str = WRITES) -> None:
        super().__init__(daemon=True)
        self._agent, self._sandbox, self._script = agent, sandbox, script
        self.error: HostError | None = None
        self.start()

    def run(self) -> None:
        with HostClient(self._agent.socket) as client:
            try:
                client.exec(
                    self._sandbox.id, Exec(["python3", "-c", self._script], timeout_seconds=600)
                )
            except HostError as error:
                self.error = error


class Lowest(threading.Thread):
    """The least that was free for everybody, looked at all the time."""

    def __init__(self, disk: Path) -> None:
        super().__init__(daemon=True)
        self._disk, self._over = disk, threading.Event()
        self.free_bytes = self.free()
        self.start()

    def free(self) -> int:
        seen = os.statvfs(self._disk)
        return seen.f_bavail * seen.f_frsize

    def run(self) -> None:
        while not self._over.wait(0.005):
            self.free_bytes = min(self.free_bytes, self.free())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.free_bytes


def fill(disk: Path, leave_bytes: int) -> Path:
    """What an operator put there, or a log: everything but so much."""
    seen = os.statvfs(disk)
    path = disk / "somebody's"
    with path.open("ab") as file:
        more = seen.f_bavail * seen.f_frsize - leave_bytes
        # What was in memory may have been written meanwhile.
        if more > 0:
            os.posix_fallocate(file.fileno(), file.tell(), more)
    return path


def make_read_only(disk: Path) -> None:
    """By an error, as a disk that breaks (errors=remount-ro in ext4(5))."""
    source = subprocess.run(
        ["findmnt", "-no", "SOURCE", str(disk)], check=True, capture_output=True, text=True
    ).stdout.strip()
    Path(f"/sys/fs/ext4/{Path(source).name}/trigger_fs_error").write_text("a test")


def mend(disk: Path, instance: Instance) -> None:
    """What an operator does by booting anew: nothing uses the disk, it is checked and mounted."""
    for name in cgroup_layout().container_names(instance.prefix):
        kill_group(cgroup_layout().container(name).unified)
    for mounted in reversed(mounts_below(RunDir.of(instance).root)):
        subprocess.run(["umount", "-l", mounted], check=True)
    for _ in eventually():
        if subprocess.run(["umount", str(disk)], check=False, capture_output=True).returncode == 0:
            break
    image = disk.with_name("disk.img")
    subprocess.run(["e2fsck", "-fy", str(image)], check=False, capture_output=True)
    subprocess.run(["mount", "-o", MOUNTED, str(image), str(disk)], check=True)


def room(host: HostClient) -> DiskStatus:
    return host.health().room


def reserve_of(host: HostClient) -> int:
    reserve = room(host).reserve_bytes
    assert reserve is not None
    return reserve


def until_held(host: HostClient, many: int = 1) -> None:
    for _ in eventually(40):
        if room(host).held >= many:
            return


def until_well(host: HostClient) -> None:
    for _ in eventually(40):
        if room(host).level == "well" and not room(host).held:
            return


def written(host: HostClient, sandbox: SandboxInfo) -> int:
    script = "import os; print(sum(e.stat().st_size for e in os.scandir('/var/tmp')))"
    return int(python(host, sandbox, script))


def test_who_writes_stands_still_and_goes_on_when_there_is_room(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    quiet, noisy = a_sandbox(host, "quiet"), a_sandbox(host, "noisy")
    reserve = reserve_of(host)
    others = fill(disk, 2 * reserve)
    lowest, writer = Lowest(disk), Writer(agent, noisy)
    until_held(host)
    # As long as what is in memory may take to be written.
    time.sleep(5)
    assert host.sandbox(noisy.id).held
    assert not host.sandbox(quiet.id).held
    assert python(host, quiet, "open('/var/tmp/a', 'w').write('b'); print(6 * 7)") == "42"
    with pytest.raises(Held, match="frozen until there is space again"):
        python(host, noisy, "")
    with pytest.raises(Held):
        host.read_path(noisy.id, "/etc/passwd")
    assert "1 sandboxes and builds are frozen" in "".join(host.health().notes)
    for begin in (
        lambda: a_sandbox(host, "new"),
        lambda: host.create_snapshot("snp_new", quiet.id),
        lambda: host.start_build(
            StartBuild("img_new", base_image=IMAGE, recipe=["true"], network="off")
        ),
    ):
        with pytest.raises(HostFull):
            begin()
    assert lowest.stop() > reserve / 2
    assert writer.is_alive()
    others.unlink()
    until_well(host)
    before = written(host, noisy)
    for _ in eventually():
        if written(host, noisy) > before:
            break
    host.delete_sandbox(noisy.id)
    host.delete_sandbox(a_sandbox(host, "new").id)


def test_who_writes_as_fast_as_can_be_takes_nothing_of_what_others_need(tmp_path: Path) -> None:
    """On the smallest disk that has a whole reserve: how fast is fast goes by the machine."""
    with small_disk(tmp_path, size_mb=LEAST_MB) as disk, a_small_agent(disk / "state") as agent:
        host = agent.client
        quiet, noisy = a_sandbox(host, "quiet"), a_sandbox(host, "noisy")
        others = fill(disk, 2 * reserve_of(host))
        lowest, writer = Lowest(disk), Writer(agent, noisy, FLOODS)
        # Held or, when that was not soon enough, ended.
        for _ in eventually(40):
            if room(host).held or host.sandbox(noisy.id).reason == "out_of_disk":
                break
        # What it had in memory is written as well.
        subprocess.run(["sync"], check=True)
        assert lowest.stop() > 0
        host.delete_sandbox(noisy.id)
        others.unlink()
        until_well(host)
        writer.join(60)
        assert isinstance(writer.error, HostError)
        # It may have stood still meanwhile, as what making it wrote is of the last seconds.
        assert host.sandbox(quiet.id).state == "running"
        assert python(host, quiet, "open('/var/tmp/a', 'w').write('b'); print(6 * 7)") == "42"


def test_who_writes_is_held_although_the_disk_stands_still(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    """The file system's journal waits for who writes much, and whatever changes a file for it."""
    agent.stop()
    # What it says goes to the process manager, and not to a file.
    agent.log_path = disk.with_name("agent.log")
    agent.start()
    noisy = a_sandbox(host, "noisy")
    others = fill(disk, 2 * reserve_of(host))
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        # Longer than it is between two attempts to change something.
        time.sleep(6)
        writer = Writer(agent, noisy, FLOODS)
        until_held(host)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)
    others.unlink()
    until_well(host)
    host.delete_sandbox(noisy.id)
    writer.join(60)


def test_who_took_the_most_is_ended_and_told_when_that_is_not_enough(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    quiet, noisy = a_sandbox(host, "quiet"), a_sandbox(host, "noisy")
    reserve = reserve_of(host)
    fill(disk, 2 * reserve)
    writer = Writer(agent, noisy)
    until_held(host)
    others = fill(disk, int(0.4 * reserve))
    for _ in eventually():
        if host.sandbox(noisy.id).state == "gone":
            break
    assert host.sandbox(noisy.id).reason == "out_of_disk"
    writer.join(60)
    assert isinstance(writer.error, HostError)
    others.unlink()
    until_well(host)
    assert python(host, quiet, "print(6 * 7)") == "42"
    assert host.sandbox(quiet.id).state == "running"
    assert not any("noisy" in name for name in groups_named(agent.prefix))
    assert not (agent.state / "disks" / f"{noisy.id}.img").exists()
    a_sandbox(host, "new")


# As a shell, Python takes a recipe's step as well.
STEP = """
import os, time
piece = os.urandom(1 << 20)
for number in range({many}):
    with open(f"/var/tmp/fill{{number}}", "wb") as file:
        for _ in range(64):
            file.write(piece)
            time.sleep(0.02)
for number in range({many}):
    os.unlink(f"/var/tmp/fill{{number}}")
"""


def a_build(agent: Agent, name: str, many: int) -> str:
    shell = agent.state / "images" / IMAGE / "tree/usr/bin/sh"
    if not shell.is_symlink():
        shell.symlink_to("python3")
    recipe, build = [STEP.format(many=many), "pass"], f"img_{name}"
    agent.client.start_build(
        StartBuild(build, base_image=IMAGE, recipe=recipe, network="restricted")
    )
    return build


def test_a_build_waits_until_there_is_room_and_is_told_when_it_had_to_end(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    reserve = reserve_of(host)
    others = fill(disk, 2 * reserve)
    build = a_build(agent, "waits", many=8)
    until_held(host)
    time.sleep(2)
    assert host.build(build).state == "running"
    others.unlink()
    assert list(host.build_events(build))[-1].kind == "published"
    others = fill(disk, 2 * reserve)
    build = a_build(agent, "ends", many=100)
    until_held(host)
    others = fill(disk, int(0.4 * reserve))
    last = list(host.build_events(build))[-1]
    assert last.data["code"] == "no_room"
    assert "The machine ran out of disk" in last.data["message"]
    others.unlink()
    until_well(host)
    assert not any(build in name for name in groups_named(agent.prefix))


def test_being_held_and_being_paused_are_two_things(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    noisy = a_sandbox(host, "noisy")
    others = fill(disk, 2 * reserve_of(host))
    Writer(agent, noisy)
    until_held(host)
    group = cgroup_layout().container(f"{agent.prefix}{noisy.id}").unified
    host.pause_sandbox(noisy.id, None)
    host.resume_sandbox(noisy.id, None)
    assert is_frozen(group)
    host.pause_sandbox(noisy.id, None)
    others.unlink()
    until_well(host)
    assert is_frozen(group)
    with pytest.raises(ContainerPaused):
        python(host, noisy, "")
    host.resume_sandbox(noisy.id, None)
    assert python(host, noisy, "print(6 * 7)") == "42"


def test_an_agent_that_is_killed_leaves_nobody_frozen(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    noisy = a_sandbox(host, "noisy")
    others = fill(disk, 2 * reserve_of(host))
    Writer(agent, noisy)
    until_held(host)
    agent.kill()
    others.unlink()
    agent.start()
    assert python(host, noisy, "print(6 * 7)") == "42"


def test_inodes_are_reserved_as_well(tmp_path: Path) -> None:
    with small_disk(tmp_path, "-N", "20000") as disk, a_small_agent(disk / "state") as agent:
        host = agent.client
        quiet = a_sandbox(host, "quiet")
        many = disk / "many"
        many.mkdir()
        for number in range(os.statvfs(disk).f_favail - 1_000):
            (many / str(number)).touch()
        for _ in eventually():
            if room(host).level == "critical":
                break
        with pytest.raises(HostFull, match="inodes"):
            a_sandbox(host, "new")
        assert python(host, quiet, "open('/var/tmp/a', 'w'); print(6 * 7)") == "42"
        assert host.sandbox(quiet.id).state == "running"
        shutil.rmtree(many)
        until_well(host)
        a_sandbox(host, "new")


def test_a_file_system_that_became_read_only_is_told_of_and_lived_with(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    sandbox, pid, instance = a_sandbox(host, "quiet"), agent.pid, host.health().instance
    kernel.syncfs(disk)
    make_read_only(disk)
    try:
        for _ in eventually():
            if room(host).level == "read_only":
                break
        assert "mounted read-only" in "".join(host.health().notes)
        with pytest.raises(HostUnavailable, match="read-only"):
            a_sandbox(host, "new")
        assert python(host, sandbox, "print(6 * 7)") == "42"
        # Longer than anything is waited for that the agent does by itself.
        time.sleep(12)
        assert host.health().instance == instance
        assert is_running(pid)
    finally:
        agent.kill()
        mend(disk, Instance(instance))
    agent.start()
    assert host.sandbox(sandbox.id).reason == "host_lost"
    a_sandbox(host, "new")


def test_the_ballast_goes_when_it_is_needed_and_comes_back(
    agent: Agent, host: HostClient, disk: Path
) -> None:
    ballast = agent.state / "ballast"
    for _ in eventually():
        if room(host).ballast:
            break
    kept = ballast.stat().st_blocks * 512
    assert kept >= 32 * MIB
    others = fill(disk, 4 * MIB)
    for _ in eventually():
        if not ballast.exists():
            break
    assert os.statvfs(disk).f_bavail * 4096 >= kept
    others.unlink()
    for _ in eventually():
        if ballast.exists():
            break
