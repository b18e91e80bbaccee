"""Warm containers: no sandbox can tell that it got one, and nobody else that there are any."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import get_ident

import pytest

from hostruntime.container.cgroups import cgroup_layout, is_populated, kill_group
from hostruntime.errors import HostError
from hostruntime.host.kernel import parent_of
from hostruntime.host.paths import StatePaths
from hostruntime.host.rundir import RUN_ROOT
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, container_of, eventually, groups_named, init_of, mounts_below
from tests.host.conftest import BASE
from tests.host.counts import grown, settled
from tests.host.warm import (
    create_from_warm,
    is_from_warm,
    keeping_warm,
    wait_for_warm,
    waiting,
)

pytestmark = pytest.mark.host

NETWORKS = ("off", "restricted", "open")
# What a program finds out about where it runs.
LOOK = r"""
hostname; id; umask; ulimit -a; pwd; cat /proc/self/status /proc/self/limits
cat /proc/self/cgroup /proc/self/oom_score_adj /proc/self/uid_map /proc/self/gid_map
cat /proc/self/attr/current /proc/1/attr/current 2>/dev/null
cat /proc/1/cmdline /proc/1/comm /proc/1/oom_score_adj | tr '\0' ' '; grep -v Time /proc/1/status
cut -d ' ' -f 4- /proc/self/mountinfo; cat /proc/net/dev | cut -d : -f 1
ls -laR --time-style=+ / --ignore=proc --ignore=sys --ignore=dev 2>/dev/null | head -3000
ls -l --time-style=+ /dev /dev/shm /tmp /workspace; stat -f -c '%b %c %S' / /tmp /workspace /dev/shm
wc -c < /etc/machine-id; cat /etc/hosts /etc/resolv.conf /etc/gitconfig; nproc; ls /proc/self/fd
"""
# Numbers that differ between any two sandboxes: pids, addresses, memory and times.
NUMBERS = [
    r"(?m)^(Pid|Tgid|NSpid|NStgid|NSsid|NSpgid|PPid|Ngid|Vm\w+|Rss\w+|HugetlbPages|VmRSS):.*",
    r"(?m)^\w*voluntary_ctxt_switches:.*",
    r"(?m)^(Mems|Cpus)_allowed.*",
    r"10\.2\d\d\.\d+\.\d+",
    r"\b1\d{9}\b",
    r"(?<=/dev/)loop\d+",
    r"master:\d+|shared:\d+",
    r"exec-[\d-]+",
    r"(?m)(?<=^/)\d+(?=/(cpuinfo|loadavg|meminfo|stat|online) )",
]


def without_numbers(text: str) -> list[str]:
    for pattern in NUMBERS:
        text = re.sub(pattern, "#", text)
    return text.splitlines()


def limits_of(name: str) -> dict[str, str]:
    """The values that limit a container, by file."""
    layout, found = cgroup_layout(), {}
    for group in layout.container(name).command_groups():
        for pattern in ("memory.*max*", "memory.*limit*", "pids.max", "cpu.*quota*", "cpu.max"):
            for path in group.glob(pattern):
                with suppress(OSError):
                    if "usage" not in path.name:
                        found[f"{group.parents[1].name}/{path.name}"] = path.read_text()
    return found


def described(agent: Agent, sandbox: str) -> dict[str, object]:
    """All that is to be the same in two sandboxes of the same shape."""
    looked = agent.client.exec(sandbox, Exec(LOOK, env={"LC_ALL": "C"}))
    environment = agent.client.exec(sandbox, Exec("env | sort"))
    init = init_of(agent, sandbox)
    return {
        "inside": without_numbers(looked.stdout.decode()),
        "environment": environment.stdout,
        "limits": limits_of(container_of(agent.state, sandbox)),
        "init": without_numbers(Path(f"/proc/{init}/status").read_text()),
        "priorities": [
            os.getpriority(os.PRIO_PROCESS, pid) for pid in (init, parent_of(init) or 0)
        ],
    }


def wanted(name: str, network: str = "off", **more: object) -> CreateSandbox:
    options: dict[str, object] = {"image": BASE, "cpu": 0.5, "memory_mb": 256} | more
    return CreateSandbox(f"sbx_{name}{time.time_ns():x}", network=network, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def warm(agent: Agent) -> Iterator[Agent]:
    """The agent, with up to four warm containers."""
    with keeping_warm(agent, 4):
        yield agent
        for sandbox in agent.client.sandboxes():
            agent.client.delete_sandbox(sandbox.id)


@pytest.fixture(autouse=True)
def nothing_left(agent: Agent) -> Iterator[None]:
    yield
    for sandbox in agent.client.sandboxes():
        agent.client.delete_sandbox(sandbox.id)


# Nobody can tell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_sandbox_cannot_tell_that_its_container_waited_for_it(warm: Agent, network: str) -> None:
    env = {"OWN": "its own"}
    # The first of its shape is started for it.
    cold = warm.client.create_sandbox(wanted("cold", network, env=env))
    assert not is_from_warm(warm, cold.id)
    claimed = create_from_warm(warm, wanted("warm", network, env=env))
    first, second = described(warm, cold.id), described(warm, claimed.id)
    for what, expected in first.items():
        assert second[what] == expected, what
    assert claimed.boot_ms > 0
    assert abs(claimed.started_at - time.time()) < 60


def test_two_that_waited_have_identities_of_their_own(warm: Agent) -> None:
    found = set()
    for name in ("one", "other"):
        sandbox = create_from_warm(warm, wanted(name))
        result = warm.client.exec(sandbox.id, Exec("cat /etc/machine-id"))
        found.add((result.stdout, init_of(warm, sandbox.id)))
    assert len({machine_id for machine_id, _ in found}) == 2


def test_nobody_sees_those_that_wait(warm: Agent) -> None:
    sandbox = create_from_warm(warm, wanted("seen"))
    wait_for_warm(warm)
    host = warm.client
    assert [each.id for each in host.sandboxes()] == [sandbox.id]
    assert (host.health().counts["containers"], host.health().counts["sandboxes"]) == (1, 1)
    assert {meter.id for meter in host.usage() if not meter.ended} == {sandbox.id}
    assert ImageStore(StatePaths(warm.state)).users(BASE) == {sandbox.id}
    used = {meter.id: meter.total for meter in host.usage()}[sandbox.id]
    assert used.gb_seconds < 1, "the time before it was the sandbox's is nobody's"


def test_nothing_in_a_waiting_container_runs(warm: Agent) -> None:
    create_from_warm(warm, wanted("idle"))
    for name in wait_for_warm(warm):
        before = cgroup_layout().container(name).cpu_us()
        time.sleep(0.3)
        assert cgroup_layout().container(name).cpu_us() == before


# The same shape ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        {"memory_mb": 320},
        {"cpu": 1.0},
        {"disk_mb": 1024},
        {"network": "open"},
        {"network": "restricted", "allow_domains": ["other.test"]},
    ],
)
def test_one_of_another_shape_is_not_taken(warm: Agent, other: Mapping[str, object]) -> None:
    base: dict[str, object] = {"network": "restricted", "allow_domains": ["some.test"]}
    create_from_warm(warm, wanted("like", **base))  # type: ignore[arg-type]
    wait_for_warm(warm)
    options = base | dict(other)
    if options["network"] != "restricted":
        del options["allow_domains"]
    sandbox = warm.client.create_sandbox(wanted("unlike", **options))  # type: ignore[arg-type]
    assert not is_from_warm(warm, sandbox.id)


def test_those_of_a_deleted_image_are_stopped_and_never_taken(warm: Agent) -> None:
    paths = StatePaths(warm.state)
    store, name = ImageStore(paths), f"img_warm{time.time_ns():x}"
    staged = store.create_staging(name)
    shutil.copytree(store.get(BASE).tree, staged / "tree", symlinks=True, copy_function=os.link)
    image = store.publish(staged, ImageManifest(name, "template", BASE, time.time(), 0, 0, 0))
    sandbox = create_from_warm(warm, wanted("deleted", image=name, memory_mb=128))
    wait_for_warm(warm)
    warm.client.delete_sandbox(sandbox.id)
    assert warm.client.delete_image(name), "nobody uses it"
    with pytest.raises(HostError):
        warm.client.create_sandbox(wanted("late", image=name, memory_mb=128))
    for _ in eventually():
        inodes = Path("/proc/self/mountinfo").read_text()
        if f"{image.tree} " not in inodes and not [
            each for each in waiting(warm) if mounted_from(warm, each, name)
        ]:
            break


def mounted_from(agent: Agent, container: str, image: str) -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(f"/roots/{container}/image " in line and f"/{image}/" in line for line in lines)


# Ends --------------------------------------------------------------------------------------------


def test_none_is_left_by_an_agent_that_stops(agent: Agent) -> None:
    with keeping_warm(agent, 2):
        create_from_warm(agent, wanted("stops"))
        wait_for_warm(agent)
        for sandbox in agent.client.sandboxes():
            agent.client.delete_sandbox(sandbox.id)
        agent.stop()
        assert groups_named("warm.") == groups_named(f"{instance(agent)}warm.") == []
        assert list((agent.state / "warm").iterdir()) == []
        assert [path.name for path in (agent.state / "disks").glob("warm.*")] == []


def instance(agent: Agent) -> str:
    return f"ork{json.loads((agent.state / 'instance.json').read_text())['index']}-"


def test_an_agent_that_was_killed_leaves_none_for_the_next_and_keeps_what_was_taken(
    agent: Agent,
) -> None:
    with keeping_warm(agent, 2):
        sandbox = create_from_warm(agent, wanted("kept", "restricted"))
        agent.client.exec(sandbox.id, Exec("echo mine > /root/file"))
        left = wait_for_warm(agent)
        agent.kill()
        agent.start()
        assert not set(waiting(agent)) & set(left)
        for name in left:
            assert groups_named(name) == []
        assert agent.client.exec(sandbox.id, Exec("cat /root/file")).stdout == b"mine\n"
        name = container_of(agent.state, sandbox.id)
        agent.client.delete_sandbox(sandbox.id)
        assert groups_named(name) == []


def test_an_agent_killed_at_any_moment_of_claims_leaves_nothing_unowned(agent: Agent) -> None:
    """Each claim moves a disk and a slot; half of that must not outlive the next start."""
    with keeping_warm(agent, 4):
        for round_number in range(5):
            with ThreadPoolExecutor(3) as pool:
                for _ in range(2):
                    pool.map(lambda _: create_or_fail(agent), range(8))
                time.sleep(0.15 + 0.07 * round_number)
                agent.kill()
            agent.start()
            for sandbox in agent.client.sandboxes():
                result = agent.client.exec(sandbox.id, Exec("echo alive"))
                assert result.stdout == b"alive\n"
                agent.client.delete_sandbox(sandbox.id)
        agent.stop()
        state = agent.state
        assert [path.name for path in (state / "disks").glob("*.img")] == []
        assert [*(state / "sandboxes").iterdir(), *(state / "warm").iterdir()] == []
        assert groups_named(f"{instance(agent)}sbx_") == []
        assert groups_named(f"{instance(agent)}warm.") == []
        run = RUN_ROOT / instance(agent).removeprefix("ork").removesuffix("-")
        assert [*(run / "slots").iterdir(), *(run / "disks").iterdir()] == []
        assert mounts_below(run / "roots") == mounts_below(run / "disks") == []


def create_or_fail(agent: Agent) -> None:
    with suppress(HostError):
        agent.client.create_sandbox(wanted(f"killed{get_ident()}", "restricted"))


def test_one_that_has_died_is_not_handed_out(warm: Agent) -> None:
    create_from_warm(warm, wanted("died"))
    for name in wait_for_warm(warm):
        group = cgroup_layout().container(name).unified
        kill_group(group)
        while is_populated(group):
            time.sleep(0.001)
    sandbox = warm.client.create_sandbox(wanted("after"))
    assert warm.client.exec(sandbox.id, Exec("echo alive")).stdout == b"alive\n"


def test_a_claimed_one_that_exits_is_gone_whole(warm: Agent) -> None:
    sandbox = create_from_warm(warm, wanted("exits"))
    name = container_of(warm.state, sandbox.id)
    os.kill(init_of(warm, sandbox.id), signal.SIGKILL)
    for _ in eventually():
        found = warm.client.sandbox(sandbox.id)
        if found.state == "gone":
            break
    assert found.reason == "exited"
    assert groups_named(name) == []


def test_a_claimed_one_pauses_resumes_and_is_copied(warm: Agent) -> None:
    host = warm.client
    sandbox = create_from_warm(warm, wanted("copied"))
    host.exec(sandbox.id, Exec("echo disk > /root/file; echo memory > /workspace/file"))
    host.pause_sandbox(sandbox.id, None)
    host.resume_sandbox(sandbox.id, None)
    name = f"snap_warm{time.time_ns():x}"
    host.create_snapshot(name, sandbox.id)
    fork = wanted("fork", image="", snapshot=name)
    try:
        host.create_sandbox(fork)
        found = host.exec(fork.id, Exec("cat /root/file /workspace/file"))
        assert found.stdout == b"disk\nmemory\n"
    finally:
        host.delete_sandbox(fork.id)
        host.delete_snapshot(name)


def test_nothing_adds_up_over_many_claims(agent: Agent) -> None:
    with keeping_warm(agent, 2):
        for _ in range(5):
            use_one(agent)
        wait_for_warm(agent, 2)
        before = settled(agent)
        for _ in range(40):
            use_one(agent)
        wait_for_warm(agent, 2)
        assert grown(before, settled(agent)) == {}


def use_one(agent: Agent) -> None:
    sandbox = agent.client.create_sandbox(wanted("many"))
    agent.client.exec(sandbox.id, Exec(["/bin/true"]))
    agent.client.delete_sandbox(sandbox.id)
