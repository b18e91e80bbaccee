"""What the client tests share: the live installation, the official SDK, and template making."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from orkestr import OrkestrClient, Sandbox

from tests.clients.making import Sandboxes, Templates
from tests.stack import Stack
from tests.stack import stack as stack

__all__ = ["stack"]


@pytest.fixture(scope="session")
def sdk(stack: Stack) -> Iterator[OrkestrClient]:
    """The official SDK's client, as `ORKESTR_BASE_URL` and `ORKESTR_API_KEY` would make it."""
    with OrkestrClient(api_key=stack.api_key, base_url=stack.url) as client:
        yield client


@pytest.fixture
def templates(stack: Stack) -> Iterator[Templates]:
    """Builds templates, and deletes after the test what the test did not."""
    with stack.client() as client:
        made = Templates(client)
        yield made
        made.delete_all()


@pytest.fixture
def sandboxes(sdk: OrkestrClient) -> Iterator[Sandboxes]:
    """Boots sandboxes with the SDK, and terminates after the test what still runs."""
    booted = Sandboxes(sdk)
    yield booted
    booted.terminate_all()


@pytest.fixture
def sandbox(sandboxes: Sandboxes) -> Sandbox:
    """One running sandbox of the smallest base, without a network."""
    return sandboxes.boot("debian-12")
