"""What an agent and its launchers hold, counted; and the work after which it must be the same."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostruntime.container.cgroups import pids_under
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox
from tests.host.agent import Agent, eventually, instance_groups
from tests.host.client import HostClient

NETWORKS = ("off", "restricted", "open")
COMMANDS_A_SANDBOX = 5
# Of memory maps the allocators may keep a few more or less, whatever was done.
ALLOWANCE = {"maps": 12}


def work(host: HostClient, image: str, creates: int, at_once: int = 1) -> None:
    """Make sandboxes, use each, and delete it.

    Several at once have the agent make all the threads that it keeps.
    """
    with ThreadPoolExecutor(at_once) as pool:
        for _ in pool.map(lambda number: _use_one(host, image, number), range(creates)):
            pass


def _use_one(host: HostClient, image: str, number: int) -> None:
    name, network = f"sbx_count{number}", NETWORKS[number % len(NETWORKS)]
    host.create_sandbox(CreateSandbox(name, image=image, cpu=1.0, memory_mb=128, network=network))
    try:
        for _ in range(COMMANDS_A_SANDBOX - 1):
            assert host.exec(name, Exec(["/bin/true"])).code == 0
        host.write_file(name, "/workspace/x", b"x")
        assert host.exec(name, Exec("cat /workspace/x")).stdout == b"x"
    finally:
        host.delete_sandbox(name)


def counted(agent: Agent) -> Counter[str]:
    """By kind and whose they are."""
    found: Counter[str] = Counter()
    for whose, pids in (("agent's", [agent.pid]), ("launchers'", agent.children())):
        for pid in pids:
            process = Path(f"/proc/{pid}")
            found[f"{whose} descriptors"] += len(list((process / "fd").iterdir()))
            found[f"{whose} threads"] += len(list((process / "task").iterdir()))
            found[f"{whose} maps"] += len((process / "maps").read_text().splitlines())
    mounts = Path(f"/proc/{agent.pid}/mountinfo").read_text().splitlines()
    instance = agent.prefix.rstrip("-")
    places = (f"{agent.state}/", f"/run/orkestr/{instance.removeprefix('ork')}/")
    found["mounts"] = sum(line.split()[4].startswith(places) for line in mounts)
    groups = instance_groups(instance)
    found["control groups"] = sum(1 for group in groups for path in group.rglob("*/"))
    found["processes"] = len({pid for group in groups for pid in pids_under(group)})
    return found


def settled(agent: Agent) -> Counter[str]:
    """The counts once nothing changes: namespaces are made ready and others destroyed meanwhile."""
    before, same = counted(agent), 0
    for _ in eventually(60):
        now = counted(agent)
        same = same + 1 if now == before else 0
        before = now
        if same >= 15:
            break
    return before


def grown(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    """What there is more of than there was, with both numbers."""
    return {
        kind: (before[kind], count)
        for kind, count in after.items()
        if count > before[kind] + ALLOWANCE.get(kind.split()[-1], 0)
    }
