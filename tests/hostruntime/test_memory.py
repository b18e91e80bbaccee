"""A process that has seen a hundred thousand names is no larger than one that has seen ten."""

from __future__ import annotations

import gc
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths

MANY = 5_000
# Says how many heaps the C library has once 64 threads have each taken memory from one.
HEAPS = """
import ctypes, os, tempfile
from hostruntime.agent.__main__ import share_heaps
from hostruntime.host.tasks import create_thread_pool

if {shared}:
    share_heaps()
pool = create_thread_pool(64)
list(pool.map(bytearray, [20_000] * 640))
libc = ctypes.CDLL(None)
libc.fdopen.restype = ctypes.c_void_p
with tempfile.TemporaryFile() as told:
    stream = ctypes.c_void_p(libc.fdopen(os.dup(told.fileno()), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    told.seek(0)
    print(told.read().count(b"<heap nr="))
"""


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


def heaps(shared: bool) -> int:
    script = HEAPS.format(shared=shared)
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    return int(answer.stdout)


def test_the_agents_threads_share_a_few_heaps() -> None:
    assert heaps(shared=False) > 2
    assert heaps(shared=True) <= 2
