"""The live installation of the client tests, for the whole tables."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.conftest import sandboxes as sandboxes
from tests.clients.conftest import sdk as sdk
from tests.clients.conftest import stack as stack
from tests.clients.making import Templates
from tests.stack import Stack

# Some install a gigabyte, and the machine may have others to serve.
BUILD_SECONDS = 1800.0


@pytest.fixture
def templates(stack: Stack) -> Iterator[Templates]:
    """Builds templates as long as they need, and deletes after the test what the test did not."""
    with stack.client() as client:
        made = Templates(client, BUILD_SECONDS)
        yield made
        made.delete_all()
