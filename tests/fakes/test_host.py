"""The fake host takes and gives what the real client does."""

from __future__ import annotations

import inspect

import pytest

from hostruntime.client.async_host_client import AsyncHostClient
from hostruntime.client.host_client import HostClient
from tests.fakes.host import FakeHost

SHARED = sorted(
    name
    for name in dir(FakeHost)
    if not name.startswith("_") and hasattr(HostClient, name) and name != "exec_frames"
)


def test_it_has_all_that_services_call() -> None:
    called = {"bases", "start_build", "build_events", "create_sandbox", "read_path"}
    called |= {"create_snapshot", "snapshots", "delete_snapshot"}
    called |= {"start_command", "background_commands", "command", "kill_command"}
    called |= {"command_output"}
    called |= {"request_base", "ensure_base"}
    called |= {"create_context", "contexts", "restart_context", "remove_context"}
    assert called <= set(SHARED)


@pytest.mark.parametrize("name", SHARED)
def test_a_method_has_the_signature_of_the_clients(name: str) -> None:
    assert inspect.signature(getattr(FakeHost, name)) == inspect.signature(
        getattr(HostClient, name)
    )


def test_what_is_streamed_has_the_signature_of_the_async_clients() -> None:
    assert inspect.signature(FakeHost.exec_to_completion) == inspect.signature(
        AsyncHostClient.exec_to_completion
    )
    assert inspect.signature(FakeHost.follow_command) == inspect.signature(
        AsyncHostClient.follow_command
    )
    for name in ("read_part", "write_stream", "code_frames"):
        assert inspect.signature(getattr(FakeHost, name)) == inspect.signature(
            getattr(AsyncHostClient, name)
        )
    assert inspect.signature(FakeHost.exec_frames) == inspect.signature(AsyncHostClient.exec_frames)
