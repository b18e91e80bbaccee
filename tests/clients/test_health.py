"""Health that answers whatever hangs: programs that are stopped where they stand (SIGSTOP)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from hostruntime.host.patience import process_tree
from tests.stack import Stack, wait_for

THINGS = {"database", "worker", "agent", "proxy", "disk"}
# What hangs with a program that does.
WITH = {
    "postgres": {"database", "worker"},
    "agent": {"agent", "proxy"},
    "worker": {"worker"},
}

# By so many, chance has asked each web process.
ASKED = 10


def ask(stack: Stack, path: str) -> httpx.Response:
    return httpx.get(f"{stack.url}{path}", trust_env=False, timeout=10)


def states(stack: Stack) -> dict[str, Any]:
    checks = ask(stack, "/readyz").json()["checks"]
    return {name: check["state"] for name, check in checks.items()}


def wrong_in(stack: Stack) -> set[str]:
    return {name for name, state in states(stack).items() if state != "ok"}


@contextmanager
def hanging(stack: Stack, program: str) -> Iterator[None]:
    """A program, with all its processes, that does nothing any more but is there."""
    stopped = list(process_tree(stack.pid(program)))
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def is_ready(stack: Stack) -> bool:
    return ask(stack, "/readyz").status_code == 200


def test_all_is_well(stack: Stack) -> None:
    wait_for(lambda: is_ready(stack), 60, stack.explain)
    told = ask(stack, "/readyz").json()
    assert told["status"] == "ready"
    assert set(told["checks"]) == THINGS
    for check in told["checks"].values():
        assert set(check) == {"state", "age_seconds"}


@pytest.mark.parametrize("program", sorted(WITH))
def test_a_program_that_hangs_is_told_by_name_and_health_hangs_with_none(
    stack: Stack, program: str
) -> None:
    wait_for(lambda: is_ready(stack), 60, stack.explain)
    with hanging(stack, program):
        # Each of these is an answer within the client's ten seconds, while the program hangs; and
        # each web process finds out for itself.
        wait_for(
            lambda: all(wrong_in(stack) == WITH[program] for _ in range(ASKED)), 90, stack.explain
        )
        ready, alive = ask(stack, "/readyz"), ask(stack, "/healthz")
        assert (ready.status_code, alive.status_code) == (503, 200)
        assert int(ready.headers["Retry-After"]) > 0
        for name in WITH[program]:
            assert ready.json()["checks"][name]["age_seconds"] > 0
    wait_for(lambda: is_ready(stack), 90, stack.explain)
