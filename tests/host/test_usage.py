"""What the agent says a sandbox has used, held against what the sandbox did."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from django.test import override_settings

from hostruntime.container.cgroups import cgroup_layout
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import SandboxInfo, UsageInfo
from orkestr_console.accounts.actor import Actor
from orkestr_console.accounts.models import Metric, UsageDay
from sandboxes_app import services, tasks
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import SandboxSpec
from tests.host.agent import CGROUPS, Agent, eventually
from tests.host.client import HostClient
from tests.host.conftest import BASE, NewSandbox

pytestmark = pytest.mark.host

# So much processor time and no more (RLIMIT_CPU in getrlimit(2)), however busy the machine is. The
# limit is counted by the clock's ticks, which on a busy machine are up to a quarter too many.
BURN = "sh -c 'ulimit -t {}; while :; do :; done'"
BURNT = 0.5


def used(host: HostClient, sandbox: SandboxInfo) -> UsageInfo:
    [info] = host.usage(sandbox.id)
    return info


def burn(host: HostClient, sandbox: SandboxInfo) -> None:
    """Use a second of the processor."""
    host.exec(sandbox.id, Exec(BURN.format(1)))


def accounted_cpu(agent: Agent, sandbox: SandboxInfo) -> float:
    """What the kernel's other counter says: cpuacct, or cpu.stat where there is only v2."""
    groups = cgroup_layout().container(f"{agent.prefix}{sandbox.id}")
    name = groups.unified.relative_to(groups.layout.unified)
    cpuacct = CGROUPS / "cpuacct" / name / "cpuacct.usage"
    if cpuacct.exists():
        return int(cpuacct.read_text()) / 1e9
    return int((groups.unified / "cpu.stat").read_text().split()[1]) / 1e6


def test_cpu_time_is_what_the_commands_took(
    agent: Agent, host: HostClient, sandbox: SandboxInfo
) -> None:
    burn(host, sandbox)
    kernel = accounted_cpu(agent, sandbox)
    assert kernel > BURNT
    for _ in eventually():
        if used(host, sandbox).total.cpu_seconds > kernel - 0.01:
            break
    assert used(host, sandbox).total.cpu_seconds == pytest.approx(kernel, abs=0.3)


def test_memory_is_counted_for_as_long_as_it_is_held(
    host: HostClient, sandbox: SandboxInfo
) -> None:
    host.exec(sandbox.id, Exec("head -c 250000000 /dev/zero > /workspace/held"))
    await_reading(host, sandbox)
    before, began = await_reading(host, sandbox)
    await_reading(host, sandbox)
    after, ended = await_reading(host, sandbox)
    # Each is seen some time after it was taken.
    assert 0.25 * 0.7 < (after - before) / (ended - began) < 0.25 * 1.4


def await_reading(host: HostClient, sandbox: SandboxInfo) -> tuple[float, float]:
    """The sum of memory after the agent's next reading, and when that was, in seconds."""
    before = used(host, sandbox).total.gb_seconds
    for _ in eventually():
        if (now := used(host, sandbox).total.gb_seconds) > before:
            break
    return now, time.monotonic()


def test_a_short_life_is_counted_whole_and_once(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    burn(host, sandbox)
    first = host.delete_sandbox(sandbox.id)
    assert first == used(host, sandbox)
    assert first is not None
    assert first.ended
    assert BURNT < first.total.cpu_seconds < 2
    assert first.total.gb_seconds > 0
    assert used(host, sandbox) == first
    host.acknowledge_usage([sandbox.id])
    assert host.usage(sandbox.id) == []
    assert sandbox.id not in {info.id for info in host.usage()}


def test_one_that_runs_is_not_forgotten(host: HostClient, sandbox: SandboxInfo) -> None:
    host.acknowledge_usage([sandbox.id])
    assert not used(host, sandbox).ended


def test_one_past_its_deadline_keeps_its_sums(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    burn(host, sandbox)
    host.set_deadline(sandbox.id, time.time())
    for _ in eventually():
        if used(host, sandbox).ended:
            break
    assert used(host, sandbox).total.cpu_seconds > BURNT


def test_a_killed_agent_loses_nothing(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    lives, ends = new_sandbox(), new_sandbox()
    burn(host, lives)
    burn(host, ends)
    host.delete_sandbox(ends.id)
    ended = used(host, ends)
    agent.kill()
    agent.start()
    assert used(host, ends) == ended
    kernel = accounted_cpu(agent, lives)
    for _ in eventually():
        if used(host, lives).total.cpu_seconds >= kernel - 0.01:
            break
    assert used(host, lives).total.cpu_seconds == pytest.approx(kernel, abs=0.3)
    assert used(host, lives).total.gb_seconds > 0


def test_what_is_collected_leaves_no_file(
    agent: Agent, host: HostClient, new_sandbox: NewSandbox
) -> None:
    sandbox = new_sandbox()
    host.delete_sandbox(sandbox.id)
    file = Path(agent.state / "usage" / f"{sandbox.id}.json")
    assert file.exists()
    # Also together with the next.
    assert host.delete_sandbox("sbx_never", [sandbox.id, "sbx_nobody"]) is None
    assert not file.exists()


def summed(metric: Metric) -> float:
    return sum(UsageDay.objects.filter(metric=metric).values_list("amount", flat=True))


@pytest.mark.django_db
def test_a_team_is_charged_what_its_sandbox_used(
    agent: Agent, host: HostClient, actor: Actor
) -> None:
    with override_settings(HOST_SOCKET=str(agent.socket)):
        sandbox = services.create_sandbox(actor, SandboxSpec(template=BASE, size="small"))
        try:
            host.exec(sandbox.pk, Exec(BURN.format(1)))
            for _ in eventually():
                tasks.tidy()
                if (running := summed(Metric.VCPU_SECONDS)) > BURNT:
                    break
            host.exec(sandbox.pk, Exec(BURN.format(1)))
            tasks.tidy()
        finally:
            services.terminate_sandbox(actor, sandbox.pk)
        tasks.tidy()
    row = Sandbox.objects.get()
    assert summed(Metric.VCPU_SECONDS) == pytest.approx(row.cpu_seconds)
    assert summed(Metric.GB_SECONDS) == pytest.approx(row.gb_seconds)
    assert row.cpu_seconds > running + BURNT
    assert host.usage(sandbox.pk) == []


def test_what_a_sandbox_uses_now_and_used_lately(host: HostClient, sandbox: SandboxInfo) -> None:
    size = 64 * 1024 * 1024
    host.exec(sandbox.id, Exec(f"head -c {size} /dev/zero >/tmp/zeros"))
    host.exec(sandbox.id, Exec(f"({BURN.format(8)}) >/dev/null 2>&1 &"))
    for _ in eventually():
        found = host.metrics(sandbox.id)
        busiest = max((sample.cpu_cores for sample in found.samples), default=0.0)
        if busiest > 0.1 and len(found.samples) > 1:
            break
    assert found.memory_bytes is not None
    assert size <= found.memory_bytes < 512 * 1024 * 1024
    # It has one CPU, whatever the machine has.
    assert busiest < 1.3
    assert found.samples[-1].memory_bytes >= size
    ages = [time.time() - sample.at for sample in found.samples]
    assert ages == sorted(ages, reverse=True)
    assert all(-1 < age < 120 for age in ages)
    assert found.total.cpu_seconds > 0
