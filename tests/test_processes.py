"""What tests see of processes, while those go on."""

from __future__ import annotations

import os

from tests.processes import open_files


def test_a_descriptor_that_is_closed_meanwhile_is_left_out() -> None:
    read, write = os.pipe()
    # The listing has the descriptor that it was read by, which is closed when it is followed.
    held = open_files(os.getpid())
    os.close(read)
    os.close(write)
    assert len([one for one in held if one.startswith("pipe:")]) >= 2
    assert not any(one.endswith(f"/{os.getpid()}/fd") for one in held)
