"""The files API with paths and trees nobody would write by hand: an answer, and only inside."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostruntime.errors import (
    FileConflict,
    FileTooLarge,
    HostError,
    InvalidRequest,
    NotFound,
)
from hostruntime.wire.commands import Exec
from hostruntime.wire.sandboxes import CreateSandbox, SandboxInfo
from tests.host.agent import Agent
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox
from tests.trees import tree_digest

pytestmark = [pytest.mark.host, pytest.mark.pythons]

# What a person can be told of a path; anything else is a defect of ours.
SAID = (NotFound, FileConflict, FileTooLarge, InvalidRequest)
PLANTED = """
mkdir -p /workspace/d/e; cd /workspace
ln -s / root; ln -s /proc/1/root out; ln -s /proc/self/cwd cwd; ln -s loop loop; ln -s .. up
ln -s {secret} secret; ln -s /proc/self/fd fds; ln -s /dev/null null; ln -s /dev/zero zero
mkfifo pipe; python3 -c 1 2>/dev/null; printf x > file; chmod 000 d/e
printf y > "$(printf 'new\\nline')"; printf z > "$(printf '\\377\\376')"; truncate -s 15T huge
"""


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of the host that no sandbox may read or change."""
    directory = tmp_path_factory.mktemp("hosts-own")
    (directory / "secret").write_text(secrets.token_hex())
    before = tree_digest(directory)
    yield directory / "secret"
    assert tree_digest(directory) == before


@pytest.fixture(scope="module")
def planted(agent: Agent, secret: Path) -> Iterator[SandboxInfo]:
    """A sandbox whose workspace is full of traps."""
    name = f"sbx_fuzz{secrets.token_hex(6)}"
    sandbox = agent.client.create_sandbox(
        CreateSandbox(name, image="debian-12", cpu=1, memory_mb=256, disk_mb=64)
    )
    made = agent.client.exec(name, Exec(PLANTED.replace("{secret}", str(secret))))
    assert made.code == 0, made.stderr
    yield sandbox
    agent.client.delete_sandbox(name)


PARTS = ["..", ".", "", "root", "out", "cwd", "loop", "up", "secret", "fds", "null", "zero", "pipe"]
PARTS += ["file", "d", "e", "new\nline", "huge", "workspace", "proc"]
PARTS += [
    "1",
    "self",
    "etc",
    "passwd",
    "dev",
    "sys",
    "tmp",
    "x" * 255,
    "x" * 256,
    "\u202e",
    "~",
    "*",
]
PATHS = st.builds(
    lambda parts, absolute: ("/" if absolute else "") + "/".join(parts),
    st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=8),
    st.booleans(),
)
Call = Callable[[HostClient, str, str, str], object]
CALLS: dict[str, Call] = {
    "read": lambda host, box, one, _: host.read_path(box, one, max_bytes=1 << 16),
    "stat": lambda host, box, one, _: host.stat(box, one),
    "write": lambda host, box, one, other: host.write_file(
        box, one, other.encode("utf-8", "replace")
    ),
    "mkdir": lambda host, box, one, other: host.mkdir(box, one, parents=len(other) % 2 == 0),
    "move": lambda host, box, one, other: host.move(box, one, other),
    "delete": lambda host, box, one, _: host.delete_path(box, one),
}
# What takes the traps away is tried less often than what walks into them.
NAMES = st.sampled_from(
    ["read", "read", "stat", "stat", "write", "write", "mkdir", "move", "delete"]
)


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=NAMES, one=PATHS, other=PATHS)
def test_every_path_has_an_answer(
    host: HostClient, planted: SandboxInfo, secret: Path, name: str, one: str, other: str
) -> None:
    try:
        answer = CALLS[name](host, planted.id, one, other)
    except SAID as error:
        assert error.detail
    except HostError as error:
        pytest.fail(f"{name} {one!r} {other!r}: {type(error).__name__} {error.detail}")
    else:
        assert secret.read_text() not in repr(answer)


def test_and_the_sandbox_and_the_agent_are_none_the_worse(
    host: HostClient, new_sandbox: NewSandbox, planted: SandboxInfo
) -> None:
    assert host.exec(planted.id, Exec(["/bin/echo", "fine"], cwd="/")).stdout == b"fine\n"
    assert host.exec(new_sandbox().id, Exec("echo fine")).stdout == b"fine\n"


@pytest.mark.parametrize("destination", ["/workspace/root", "/tmp/all", "/workspace/d/x"])
def test_the_root_is_not_moved_anywhere(
    host: HostClient, planted: SandboxInfo, destination: str
) -> None:
    with pytest.raises(FileConflict, match="/ is a mount point"):
        host.move(planted.id, "/", destination)


def test_a_directory_does_not_go_into_itself(host: HostClient, new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    host.mkdir(sandbox.id, "/tmp/d/e")
    with pytest.raises(FileConflict):
        host.move(sandbox.id, "/tmp/d", "/tmp/d/e/f")
    host.exec(
        sandbox.id, Exec("ln -s /workspace /root/across; mkdir -p /root/a; mkfifo /root/a/pipe")
    )
    with pytest.raises(FileConflict, match="cannot be moved there"):
        host.move(sandbox.id, "/root/a", "/workspace/a")
