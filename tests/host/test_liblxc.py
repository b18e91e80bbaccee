"""The installed liblxc knows all that we configure, and runs nothing of the host's for it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGINT

import lxc
import pytest

from hostruntime.container.cgroups import CgroupLayout
from hostruntime.container.config import INIT, ContainerConfig
from hostruntime.container.limits import Limits
from hostruntime.host.paths import StatePaths
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, an_agent
from tests.host.network import wait_until
from tests.host.smalltree import PYTHON, make_small_tree

pytestmark = pytest.mark.host

IMAGE = "img_small"
V2 = CgroupLayout("v2", Path("/sys/fs/cgroup"), {}, (Path("/sys/fs/cgroup"),))
DELEGATED = CgroupLayout("v2", V2.unified, {}, V2.hierarchies, delegated=True)


def every_layout(v1: Path) -> Iterator[CgroupLayout]:
    """Of both kinds; with files that make a layout say all it has to say."""
    (v1 / "memory").mkdir()
    for name in ("memory.memsw.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes"):
        (v1 / "memory" / name).touch()
    controllers = {name: v1 / name for name in ("memory", "pids", "cpu")}
    yield V2
    yield DELEGATED
    yield CgroupLayout("hybrid", v1 / "unified", controllers, (v1,))
    swapping = v1 / "v2"
    group = swapping / V2.instance_group("ork9-x")
    group.mkdir(parents=True)
    (group / "memory.swap.max").touch()
    yield CgroupLayout("v2", swapping, {}, (swapping,))


def configured(layout: CgroupLayout, scratch: Path, netns: Path | None) -> list[tuple[str, str]]:
    config = ContainerConfig(
        name="ork9-x",
        hostname="sandbox",
        root=scratch,
        id_base=1_000_000_000,
        netns=netns,
        limits=Limits(cpu=1.0, memory_mb=1024),
        seccomp=scratch / "seccomp",
        apparmor="orkestr-9",
        log=scratch / "log",
    )
    return config.items(layout)


def test_liblxc_takes_every_key_and_value(tmp_path: Path) -> None:
    seen = set()
    for number, layout in enumerate(every_layout(tmp_path)):
        for netns in (None, Path("/proc/self/ns/net")):
            container = lxc.Container(f"ork9-x{number}", str(tmp_path))
            for key, value in configured(layout, tmp_path, netns):
                assert container.append_config_item(key, value), f"{key} = {value}"
                seen.add(key)
    assert {
        "lxc.cgroup2.memory.swap.max",
        "lxc.cgroup.memory.memsw.limit_in_bytes",
        "lxc.cgroup.memory.kmem.tcp.limit_in_bytes",
        "lxc.apparmor.profile",
        "lxc.namespace.keep",
        "lxc.namespace.share.net",
        "lxc.net.0.type",
    } <= seen


def test_liblxc_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Or the test above would prove nothing."""
    container = lxc.Container("ork9-x", str(tmp_path))
    assert not container.append_config_item("lxc.orkestr.unheard_of", "1")
    assert not container.append_config_item("lxc.log.level", "SHOUTING")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    """An agent with an image to run Python in."""
    state = tmp_path_factory.mktemp("live")
    store = ImageStore(StatePaths(state).ensure())
    staged = store.create_staging(IMAGE)
    make_small_tree(staged / "tree")
    store.publish(staged, ImageManifest(IMAGE, "base", None, time.time(), 0, 0, 0))
    with an_agent(state) as agent:
        yield agent


@contextmanager
def executions(of: list[int], said: Path) -> Iterator[None]:
    """Have strace(1) write down what these processes and all that comes of them execute."""
    pids = [word for pid in of for word in ("-p", str(pid))]
    argv = ["strace", "-f", "-qq", "-e", "trace=execve,execveat", "-o", str(said), *pids]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as tracer:
        try:
            wait_until(lambda: all(_is_traced(pid) for pid in of))
            yield
        finally:
            # It lets go of all, and ends.
            tracer.send_signal(SIGINT)
            tracer.communicate(timeout=20)


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("network", ["off", "open"])
def test_a_containers_life_executes_nothing_of_the_hosts_but_lxc(
    live: Agent, tmp_path: Path, network: str
) -> None:
    name, said = f"sbx_traced{network}", tmp_path / "executed"
    with executions(live.children(), said):
        live.client.create_sandbox(
            CreateSandbox(name, image=IMAGE, cpu=1.0, memory_mb=256, network=network)
        )
        try:
            argv = [PYTHON, "-c", "print('traced')"]
            done = live.client.exec(name, Exec(argv, cwd="/root", timeout_seconds=60))
            live.client.pause_sandbox(name, None)
            live.client.resume_sandbox(name, None)
        finally:
            live.client.delete_sandbox(name)
    assert done.stdout == b"traced\n"
    executed = re.findall(r'execve(?:at)?\((?:\d+, |AT_FDCWD, )?"([^"]*)"', said.read_text())
    # The copy of lxc-start, which is a descriptor.
    assert re.fullmatch(r"/proc/self/fd/\d+", executed.pop(0))
    assert executed == [INIT.split()[0], PYTHON]
