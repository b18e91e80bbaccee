"""A container's own disk: it runs out for its owner alone, and goes without a trace."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from hostruntime.container.disk import _FS_IOC_SHUTDOWN, MIB, Disks
from hostruntime.errors import HostError, HostFull
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.wire.builds import StartBuild
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo
from tests.host.agent import Agent, eventually, mounts_below
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = pytest.mark.host

SMALL_MB = 64


@pytest.fixture
def small(new_sandbox: NewSandbox) -> SandboxInfo:
    return new_sandbox(disk_mb=SMALL_MB)


def answer(host: HostClient, sandbox: SandboxInfo, command: str) -> str:
    result = host.exec(sandbox.id, Exec(command, timeout_seconds=60))
    return (result.stdout + result.stderr).decode().strip()


def blocks_of(agent: Agent, sandbox: SandboxInfo) -> int:
    """How many bytes of the host's disk a sandbox's disk takes."""
    return (agent.state / f"disks/{sandbox.id}.img").stat().st_blocks * 512


def loop_devices(agent: Agent) -> list[str]:
    """The loop devices that have a disk of this agent below them."""
    disks = str(agent.state / "disks")
    found = Path("/sys/block").glob("loop*/loop/backing_file")
    return [str(path) for path in found if _read(path).startswith(disks)]


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def await_that(holds: Callable[[], bool]) -> None:
    for _ in eventually():
        if holds():
            return


# Running out --------------------------------------------------------------------------------


def test_a_full_disk_is_its_owners_problem_alone(
    agent: Agent, host: HostClient, small: SandboxInfo, sandbox: SandboxInfo
) -> None:
    said = answer(host, small, "dd if=/dev/zero of=/root/fill bs=1M count=500 2>&1; echo $?")
    assert "No space left on device" in said and said.endswith("1")
    assert 40 * MIB < blocks_of(agent, small) <= SMALL_MB * MIB
    assert answer(host, sandbox, "head -c 200M /dev/zero > /root/x && echo fine") == "fine"
    # And the owner goes on as soon as it makes room.
    assert (
        answer(host, small, "echo x > /etc/more; rm /root/fill; echo y > /etc/more; cat /etc/more")[
            -1
        ]
        == "y"
    )


def test_files_run_out_before_the_hosts_do(host: HostClient, small: SandboxInfo) -> None:
    script = (
        "mkdir /var/many; cd /var/many; i=0; while : > $i; do i=$((i+1)); done 2>&1; ls | wc -l"
    )
    said = answer(host, small, script)
    assert "No space left on device" in said
    assert SMALL_MB * MIB // 16_384 * 0.9 < int(said.split()[-1]) <= SMALL_MB * MIB // 16_384


def test_the_size_is_what_df_says_and_no_other_way_leads_around_it(
    host: HostClient, small: SandboxInfo
) -> None:
    shown = int(answer(host, small, "df -m --output=size / | tail -1"))
    assert SMALL_MB * 0.8 < shown <= SMALL_MB
    for where in ("/", "/var/tmp", "/usr/local/bin", "/etc/deep/er"):
        script = f"mkdir -p {where}; dd if=/dev/zero of={where}/f bs=1M count=100; rm {where}/f"
        assert "No space left" in answer(host, small, script)


def test_files_are_on_the_device_of_their_directories(host: HostClient, small: SandboxInfo) -> None:
    """As ``find -xdev``, ``tar --one-file-system`` and ``os.path.ismount`` take for granted."""
    made = "touch /usr/bin/new; chmod 755 /usr/bin/env"
    said = answer(host, small, f"{made}; stat -c %d / /usr/bin /usr/bin/* /etc/* | sort -u | wc -l")
    assert said == "1"


def test_holes_take_no_room(agent: Agent, host: HostClient, small: SandboxInfo) -> None:
    said = answer(host, small, "truncate -s 15T /root/huge && stat -c %s /root/huge")
    assert said == str(15 << 40)
    assert blocks_of(agent, small) < 8 * MIB


def test_a_build_that_fills_its_disk_is_told_so(host: HostClient) -> None:
    recipe = ["true", "head -c 100M /dev/zero > /root/fill"]
    name = f"img_full{time.time_ns():x}"
    host.start_build(
        StartBuild(name, base_image=BASE, recipe=recipe, network="restricted", disk_mb=SMALL_MB)
    )
    events = list(host.build_events(name))
    assert (events[-1].data["code"], events[-1].data["step"]) == ("out_of_disk", 2)
    assert f"A build has {SMALL_MB} MiB" in events[-1].data["message"]
    host.cancel_build(name)


def test_nothing_starts_on_a_host_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = StatePaths(tmp_path).ensure()
    instance = claim_instance(paths)
    try:
        monkeypatch.setattr("hostruntime.host.disk_space._reserve_bytes", lambda size: size)
        with pytest.raises(HostFull, match="Delete templates or sandboxes, or free up space"):
            Disks(paths, instance).attach("sbx_1", 16)
        assert list(paths.disks.iterdir()) == []
    finally:
        release_instance(paths)


# Coming and going ---------------------------------------------------------------------------


def test_more_sandboxes_than_the_kernel_made_loop_devices_for(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    before = len(loop_devices(agent))
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: new_sandbox(disk_mb=SMALL_MB, memory_mb=64), range(12)))
    assert len(loop_devices(agent)) == before + 12
    assert {answer(host, one, "echo $((6*7)) > /root/x; cat /root/x") for one in made} == {"42"}
    for one in made:
        host.delete_sandbox(one.id)
    await_that(lambda: len(loop_devices(agent)) == before)
    assert not [one for one in made if list((agent.state / "disks").glob(f"{one.id}*"))]


def test_what_was_written_goes_at_once_however_much_it_is(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox(memory_mb=1024)
    answer(
        host,
        sandbox,
        "head -c 600M /dev/zero > /root/a; mkdir /root/d; cd /root/d; touch {1..9000}; sync",
    )
    assert blocks_of(agent, sandbox) > 500 * MIB
    disk, devices = f"{sandbox.id}.img", loop_devices(agent)
    assert [one for one in devices if disk in _read(Path(one))]
    host.delete_sandbox(sandbox.id)
    # A file that is gone by name and that no device has open any more has its room given back.
    await_that(lambda: not list((agent.state / "disks").glob(f"{sandbox.id}*")))
    await_that(lambda: not [one for one in loop_devices(agent) if disk in _read(Path(one))])


def test_a_sandbox_that_ended_by_itself_gives_its_disk_back(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    assert list((agent.state / "disks").glob(f"{sandbox.id}*"))
    host.set_deadline(sandbox.id, time.time())
    await_that(lambda: not list((agent.state / "disks").glob(f"{sandbox.id}*")))


def test_a_killed_agent_leaves_disks_that_the_next_one_keeps_or_frees(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    kept = new_sandbox(disk_mb=SMALL_MB)
    answer(host, kept, "echo precious > /root/kept")
    agent.kill()
    # What a kill in the midst of a start leaves: a disk whose container never was.
    paths = StatePaths(agent.state)
    disks = Disks(paths, claim_instance(paths))
    orphan = disks.attach("sbx_orphan", 16)
    assert orphan.is_mount()
    agent.start()
    assert answer(host, kept, "cat /root/kept; echo more >> /root/kept; wc -l < /root/kept") == (
        "precious\n2"
    )
    assert mounts_below(orphan) == []
    assert not list(paths.disks.glob("sbx_orphan*"))


@pytest.mark.parametrize(("written_mb", "shutdowns"), [(0, 0), (8, 1)])
def test_a_disk_with_little_on_it_is_released_without_an_alert_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_mb: int, shutdowns: int
) -> None:
    paths = StatePaths(tmp_path).ensure()
    disks = Disks(paths, claim_instance(paths))
    called: list[object] = []
    monkeypatch.setattr(
        "hostruntime.container.disk.fcntl.ioctl", partial(counted, called, fcntl.ioctl)
    )
    try:
        (disks.attach("sbx_1", SMALL_MB) / "file").write_bytes(bytes(written_mb * MIB))
        disks.release("sbx_1")
        assert disks.owners() == set()
        assert called.count(_FS_IOC_SHUTDOWN) == shutdowns
    finally:
        release_instance(paths)


def counted(
    called: list[object], ioctl: Callable[..., object], descriptor: int, request: int, *more: object
) -> object:
    called.append(request)
    return ioctl(descriptor, request, *more)


# Capture ------------------------------------------------------------------------------------


@pytest.fixture
def image(host: HostClient) -> Iterator[str]:
    """The name of an image that is deleted when the test ends."""
    name = f"img_disk{time.time_ns():x}"
    yield name
    with suppress(HostError):
        host.delete_image(name)


RECIPE = """
mkdir -p /srv/a/b && cd /srv
head -c 3M /dev/urandom > a/data && sha256sum < a/data > a/sum
ln a/data a/b/again && ln a/data top
truncate -s 20G hole && printf end >> hole
install -m 4755 -o 1000 -g 1001 /bin/true suid
mkfifo -m 600 pipe; ln -s ../etc/hostname link
touch -d @1234567890 a/old
printf '%s' x > "$(printf 'odd\\nname \\377')"
"""
CHECK = """
cd /srv; sha256sum < a/data | cmp - a/sum && stat -c '%h %i' a/data a/b/again top | sort -u
stat -c '%s %b' hole; tail -c 3 hole; echo
stat -c '%a %u %g' suid; stat -c '%F %a' pipe; readlink link; stat -c %Y a/old
ls | wc -l; ls -b | grep odd
"""


def test_what_a_build_wrote_is_carried_over_whole(
    agent: Agent, host: HostClient, image: str, new_sandbox: NewSandbox
) -> None:
    host.start_build(StartBuild(image, base_image=BASE, recipe=[RECIPE], network="restricted"))
    events = list(host.build_events(image))
    assert events[-1].kind == "published", events[-1]
    said = answer(host, new_sandbox(image=image), CHECK).splitlines()
    links, hole = said[0].split(), said[1].split()
    assert links[0] == "3" and len(said) == 9
    assert (int(hole[0]), int(hole[1]) < 64) == ((20 << 30) + 3, True)
    assert said[2:] == [
        "end",
        "4755 1000 1001",
        "fifo 600",
        "../etc/hostname",
        "1234567890",
        "8",  # the name with a newline takes two lines
        r"odd\nname\ \377",
    ]
