"""A process that has seen a hundred thousand names is no larger than one that has seen ten."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths

MANY = 5_000


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def kept_bytes(use: Callable[[str], object]) -> float:
    """How much is kept of each name that was used once."""
    for number in range(100):
        use(f"warm{number:030d}")
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(MANY):
        use(f"name{number:030d}")
    gc.collect()
    return (tracemalloc.get_traced_memory()[0] - before) / MANY


def a_path(name: str) -> object:
    path = StatePaths(Path("/nowhere") / name).images / f"{name}.json"
    return path.exists(), path.parent.name, path.with_suffix(".new"), path.parts


def test_nothing_is_kept_of_a_path_that_is_used_no_more(traced: None) -> None:
    assert kept_bytes(a_path) < 4
