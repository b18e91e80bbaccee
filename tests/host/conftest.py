"""Fixtures for tests on real LXC: an agent, and sandboxes on it that go away again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count

import pytest

from hostruntime.errors import HostError
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.bases import NAMES, restore_bases
from tests.host.agent import Agent, an_agent
from tests.host.attackers import attackers_image
from tests.host.client import HostClient

BASE = "debian-12"
_numbers = count(1)

NewSandbox = Callable[..., SandboxInfo]


@pytest.fixture(scope="session")
def agent() -> Iterator[Agent]:
    with an_agent() as running:
        for _ in running.client.ensure_base(BASE):
            pass
        yield running


@pytest.fixture(scope="session")
def bases(agent: Agent) -> None:
    """Python's and Node's bases, made if nobody has left them."""
    restore_bases(agent.state)
    for name in NAMES:
        for _ in agent.client.ensure_base(name):
            pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have what wants those bases run last: the live installation may have made them by then."""
    items.sort(key=lambda item: "bases" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def attackers(agent: Agent) -> Iterator[str]:
    """An image to attack from."""
    with attackers_image(agent, BASE) as name:
        yield name


@pytest.fixture
def host(agent: Agent) -> HostClient:
    return agent.client


@pytest.fixture
def new_sandbox(host: HostClient) -> Iterator[NewSandbox]:
    """Makes sandboxes that are terminated when the test ends."""
    made: list[str] = []

    def create(**wishes: object) -> SandboxInfo:
        name = f"sbx_test{time.time_ns():x}{next(_numbers)}"
        made.append(name)
        options: dict[str, object] = {"image": BASE, "cpu": 1.0, "memory_mb": 512} | wishes
        return host.create_sandbox(CreateSandbox(name, **options))  # type: ignore[arg-type]

    yield create
    for name in made:
        with suppress(HostError):
            host.delete_sandbox(name)


@pytest.fixture
def sandbox(new_sandbox: NewSandbox) -> SandboxInfo:
    return new_sandbox()
