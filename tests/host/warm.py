"""An agent that keeps warm containers, which tests' agents do not unless they ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from hostruntime.container.cgroups import cgroup_layout, is_frozen
from hostruntime.sandbox.warm_pool import PREFIX, SETTING
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent, container_of, eventually


@contextmanager
def keeping_warm(agent: Agent, number: int = 2) -> Iterator[None]:
    """Restart an agent, so that it keeps up to ``number`` of them while the block runs."""
    before = agent.environment[SETTING]
    try:
        _restart(agent, str(number))
        yield
    finally:
        _restart(agent, before)


def _restart(agent: Agent, number: str) -> None:
    if agent.process is not None and agent.process.poll() is None:
        agent.stop()
    agent.environment[SETTING] = number
    agent.start()


def waiting(agent: Agent) -> list[str]:
    """The names of the warm containers that no sandbox has taken over, all of them frozen."""
    names = [f"{agent.prefix}{path.name}" for path in (agent.state / "warm").iterdir()]
    layout = cgroup_layout()
    return sorted(name for name in names if is_frozen(layout.container(name).unified))


def wait_for_warm(agent: Agent, number: int = 1) -> list[str]:
    """Wait until at least so many wait; their names."""
    for _ in eventually():
        if len(found := waiting(agent)) >= number:
            break
    return found


def create_from_warm(agent: Agent, request: CreateSandbox) -> SandboxInfo:
    """Create a sandbox that takes over a warm container, of a shape that it asks for first."""
    while True:
        first = agent.client.create_sandbox(replace(request, id=f"{request.id}_first"))
        agent.client.delete_sandbox(first.id)
        wait_for_warm(agent)
        sandbox = agent.client.create_sandbox(request)
        if is_from_warm(agent, sandbox.id):
            return sandbox
        # What waited was of another shape.
        agent.client.delete_sandbox(sandbox.id)


def is_from_warm(agent: Agent, sandbox_id: str) -> bool:
    """Whether a sandbox's container waited for it."""
    return container_of(agent.state, sandbox_id).startswith(f"{agent.prefix}{PREFIX}")
