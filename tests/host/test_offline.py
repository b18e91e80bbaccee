"""Programs in containers with network `off` say at once what they lack, and use what they have.

What is counted is how often they ask for a name, which nothing answers.
"""

from __future__ import annotations

import pytest

from hostruntime.wire.commands import Exec
from tests.host.client import HostClient
from tests.host.conftest import NewSandbox

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("base", "command", "most"),
    [
        ("python-3.12-bare", "pip install orkestr-has-no-such-package", 2),
        ("node-22", "npx --yes orkestr-has-no-such-package", 0),
        ("node-22", "su - node -c 'npm view orkestr-has-no-such-package' || exit 1", 0),
    ],
    ids=["pip", "npx", "npm"],
)
def test_a_program_gives_up_at_once(
    host: HostClient,
    bases: None,
    new_sandbox: NewSandbox,
    base: str,
    command: str,
    most: int,
) -> None:
    box = new_sandbox(image=base, network="off")
    done = host.exec(box.id, Exec(["sh", "-c", f"useradd -m node 2>/dev/null; {command}"]))
    assert done.code != 0
    assert max(host.requested_hosts(box.id).values(), default=0) <= most


def test_apt_asks_once_for_each_index(host: HostClient, new_sandbox: NewSandbox) -> None:
    update = "apt-get update -o APT::Update::Error-Mode=any"
    as_it_is, as_elsewhere = (new_sandbox(network="off") for _ in range(2))
    assert host.exec(as_it_is.id, Exec(update)).code != 0
    assert host.exec(as_elsewhere.id, Exec(f"{update} -o Acquire::Retries=3")).code != 0
    few, many = (host.requested_hosts(box.id) for box in (as_it_is, as_elsewhere))
    assert few.keys() == many.keys() != set()
    assert few.total() < many.total()


def test_what_the_sandbox_or_the_command_says_comes_over_it(
    host: HostClient, new_sandbox: NewSandbox
) -> None:
    box = new_sandbox(network="off", env={"UV_OFFLINE": "0"})
    said = "echo $UV_OFFLINE $CARGO_NET_OFFLINE"
    assert host.exec(box.id, Exec(said)).stdout == b"0 true\n"
    assert host.exec(box.id, Exec(said, env={"CARGO_NET_OFFLINE": "false"})).stdout == b"0 false\n"
    near = new_sandbox(network="restricted")
    assert host.exec(near.id, Exec(said)).stdout == b"\n"
