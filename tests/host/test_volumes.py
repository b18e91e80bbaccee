"""Volumes on real LXC: what is on one outlives its sandbox, and any crash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from hostruntime.errors import (
    HostError,
    HostUnavailable,
    VolumeDamaged,
    VolumeInUse,
    VolumeMissing,
)
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.image.trash import Trash
from hostruntime.volume.store import VolumeStore
from hostruntime.wire.commands import Exec
from hostruntime.wire.volumes import AttachVolume
from tests.host.agent import Agent, eventually, init_of
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host

MEBIBYTE = 1024 * 1024
_numbers = count(1)


@pytest.fixture
def volume(agent: Agent) -> Iterator[AttachVolume]:
    """A new volume of the smallest size, deleted when the test ends."""
    one = AttachVolume(f"vol_test{time.time_ns():x}{next(_numbers)}", 256, new=True)
    yield one
    for info in agent.client.volumes():
        if info.id.startswith(one.id):
            for _ in eventually():
                try:
                    agent.client.delete_volume(info.id)
                except (VolumeInUse, HostUnavailable):
                    continue
                break


def old(volume: AttachVolume) -> AttachVolume:
    return AttachVolume(volume.id, volume.size_mb)


def image_of(agent: Agent, volume: AttachVolume) -> Path:
    return agent.state / "volumes" / f"{volume.id}.ext4"


def run(host: HostClient, sandbox_id: str, command: str) -> str:
    done = host.exec(sandbox_id, Exec(command))
    assert done.code == 0, (command, done.stdout, done.stderr)
    return done.stdout.decode().strip()


def left_of(agent: Agent, volume: AttachVolume) -> list[str]:
    """What there is of a volume on the host: its file, and mounts."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found = [line.split()[4] for line in mounts if volume.id in line]
    return found + [path.name for path in (agent.state / "volumes").glob(f"*{volume.id}*")]


def test_what_is_on_a_volume_goes_from_one_sandbox_to_the_next(
    agent: Agent, host: HostClient, volume: AttachVolume, new_sandbox: NewSandbox
) -> None:
    first = new_sandbox(volume=volume)
    assert first.volume == volume.id
    # As in /workspace, for every user; and nothing is there that nobody put there.
    assert run(host, first.id, "stat -c %a:%u:%g /persist; ls -A /persist") == "1777:0:0"
    options = run(host, first.id, "grep ' /persist ' /proc/mounts").split()[3].split(",")
    assert {"rw", "nosuid", "nodev"} <= set(options)
    write = "echo kept >/persist/file; chown 1000:1000 /persist/file; sync /persist/file"
    run(host, first.id, f"{write}; ln -s /etc/passwd /persist/link; mkfifo /persist/pipe")
    # A file system of its own: it fills up alone.
    fill = host.exec(first.id, Exec("head -c 400000000 /dev/zero >/persist/big"))
    assert fill.code != 0
    assert b"No space left" in fill.stderr
    run(host, first.id, "rm /persist/big; sync; head -c 1000000 /dev/zero >/root/elsewhere")
    with pytest.raises(VolumeInUse):
        new_sandbox(volume=old(volume))
    with pytest.raises(VolumeInUse):
        host.delete_volume(volume.id)
    # A snapshot has the directory, and nothing that is on the volume; nor does it wait for it.
    snapshot = host.create_snapshot(f"snap_{volume.id}", first.id)
    host.pause_sandbox(first.id, None)
    with pytest.raises(VolumeInUse):
        new_sandbox(volume=old(volume))
    host.resume_sandbox(first.id, None)
    fork = new_sandbox(image="", snapshot=snapshot.id)
    assert run(host, fork.id, "ls -A /persist; grep -c persist /proc/mounts || true") == "0"
    host.delete_sandbox(first.id)
    # Even a snapshot where something else is at /persist gets the volume there.
    run(host, fork.id, "rmdir /persist; ln -s /etc /persist")
    other = host.create_snapshot(f"snap_{volume.id}b", fork.id)
    second = new_sandbox(image="", snapshot=other.id, volume=old(volume))
    listed = run(host, second.id, "stat -c %n:%u /persist/*; cat /persist/file; ls /etc/passwd")
    assert listed.split() == [
        *("/persist/file:1000", "/persist/link:0", "/persist/pipe:0"),
        *("kept", "/etc/passwd"),
    ]
    # The space of what was deleted is the host's again, once ext4 has got round to it.
    for _ in eventually():
        [info] = [one for one in host.volumes() if one.id == volume.id]
        assert (info.size_mb, info.sandbox) == (256, second.id)
        if info.used_bytes < 50 * MEBIBYTE:
            break
    host.delete_sandbox(second.id)
    for one in (snapshot, other):
        host.delete_snapshot(one.id)
    host.delete_volume(volume.id)
    host.delete_volume(volume.id)
    assert left_of(agent, volume) == []
    with pytest.raises(VolumeMissing):
        new_sandbox(volume=old(volume))
    assert left_of(agent, volume) == []


def test_a_volume_survives_the_agent_the_container_and_the_power(
    agent: Agent, host: HostClient, volume: AttachVolume, new_sandbox: NewSandbox
) -> None:
    first = new_sandbox(volume=volume)
    run(host, first.id, "echo flushed >/persist/file; sync /persist/file /persist")
    # What a disk has when the power fails: what was flushed, and a journal to replay.
    lost_power = AttachVolume(f"{volume.id}p", volume.size_mb)
    shutil.copyfile(image_of(agent, volume), image_of(agent, lost_power))
    # As a backup copies it, at one instant; and one that died in the midst leaves nothing.
    copy = agent.state / "volumes" / f".{volume.id}.copy"
    host.copy_volume(volume.id)
    checked = subprocess.run(["e2fsck", "-f", "-n", copy], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    mounted = Path(f"/run/orkestr/{host.health().instance}/volumes/{volume.id}")
    subprocess.run(["fsfreeze", "--freeze", mounted], check=True)
    agent.kill()
    agent.start()
    assert not copy.exists()
    run(host, first.id, "cat /persist/file; echo after >/persist/file")
    with pytest.raises(VolumeInUse):
        new_sandbox(volume=old(volume))
    again = new_sandbox(volume=lost_power)
    assert run(host, again.id, "cat /persist/file") == "flushed"
    host.delete_sandbox(again.id)
    host.delete_volume(lost_power.id)
    # It ends by itself, and the volume is free.
    os.kill(init_of(agent, first.id), signal.SIGKILL)
    for _ in eventually():
        if host.sandbox(first.id).state == "gone":
            break
    # Also if some process of the machine's keeps it mounted: an operator's shell.
    second = new_sandbox(volume=old(volume))
    operator = subprocess.Popen(["sleep", "1000"], cwd=mounted)
    try:
        assert run(host, second.id, "cat /persist/file; echo more >>/persist/file") == "after"
        host.delete_sandbox(second.id)
        third = new_sandbox(volume=old(volume))
        assert run(host, third.id, "cat /persist/file").split() == ["after", "more"]
        host.delete_sandbox(third.id)
        host.delete_volume(volume.id)
    finally:
        operator.kill()
        operator.wait()
    assert left_of(agent, volume) == []


def test_what_a_killed_agent_was_about_to_start_is_undone_and_no_data_is_lost(
    agent: Agent, host: HostClient, volume: AttachVolume, new_sandbox: NewSandbox
) -> None:
    first = new_sandbox(volume=volume)
    run(host, first.id, "echo kept >/persist/file")
    host.delete_sandbox(first.id)
    instance = Instance(host.health().instance)
    agent.kill()
    paths = StatePaths(agent.state)
    store = VolumeStore(paths, instance, Trash(paths))
    fresh = AttachVolume(f"{volume.id}n", 256, new=True)
    for one in (fresh, old(volume)):
        store.attach(one)
    agent.start()
    assert left_of(agent, fresh) == []
    # And one whose start fails: no sandbox has ever had it.
    with pytest.raises(HostError):
        new_sandbox(image="img_nothing", volume=fresh)
    with pytest.raises(HostError):
        new_sandbox(volume=fresh, env={"A": "x" * 3_000_000})
    assert left_of(agent, fresh) == []
    again = new_sandbox(volume=old(volume))
    assert run(host, again.id, "cat /persist/file") == "kept"
    host.delete_sandbox(again.id)
    # A damaged one is refused, and left as it is.
    image = image_of(agent, volume)
    with image.open("r+b") as file:
        file.seek(1024)
        file.write(os.urandom(1024))
        file.seek(128 * MEBIBYTE)
        file.write(os.urandom(4096))
    before = image.read_bytes()[: 4 * MEBIBYTE]
    with pytest.raises(VolumeDamaged) as refused:
        new_sandbox(volume=volume)
    assert str(agent.state) not in refused.value.detail
    assert image.read_bytes()[: 4 * MEBIBYTE] == before
