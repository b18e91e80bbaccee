"""A command does not wait for the kernel to move it into its control group."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container.cgroup_migrations import OPTION, favor_migrations, mount_options
from hostruntime.container.cgroups import cgroup_layout


@pytest.fixture
def slow_migrations() -> Iterator[Path]:
    """The hierarchy as the kernel has it by default."""
    where = cgroup_layout().unified
    kept = mount_options(where) - {OPTION, "rw"}
    options = ",".join(["remount", *sorted(kept)])
    # By its type and source: for a place alone, mount(8) adds the options that there are.
    subprocess.run(["mount", "-t", "cgroup2", "-o", options, "cgroup2", where], check=True)
    yield where
    favor_migrations()


def test_the_kernel_is_asked_for_it_and_what_was_set_stays(slow_migrations: Path) -> None:
    before = mount_options(slow_migrations)
    assert OPTION not in before
    favor_migrations()
    assert mount_options(slow_migrations) == before | {OPTION}


def test_options_are_those_of_the_place_asked_about(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        "25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n"
        "26 25 0:24 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    assert mount_options(Path("/sys/fs/cgroup"), mountinfo) == {"rw", "nsdelegate"}
    assert mount_options(Path("/nowhere"), mountinfo) == set()
