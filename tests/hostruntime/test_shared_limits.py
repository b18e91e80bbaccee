"""Limits of the whole machine are raised where they are low, and never lowered."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostruntime.container.shared_limits import MINIMUMS, low_limits, max_processes, raise_limits

NO_GROUPS = Path("/nonexistent")


@pytest.fixture
def sysctls(tmp_path: Path) -> Path:
    """As on a small machine without systemd, but that one is higher than we would have it."""
    values = {
        "kernel/pid_max": 32_768,
        "kernel/threads-max": 7000,
        "kernel/pty/max": 4096,
        "fs/file-max": 100_000,
        "net/netfilter/nf_conntrack_max": 10 * MINIMUMS["net/netfilter/nf_conntrack_max"],
    }
    for name, value in values.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    return tmp_path


def number(path: Path) -> int:
    return int(path.read_text())


def test_what_is_low_is_raised_and_what_is_high_stays(sysctls: Path) -> None:
    assert [low.setting for low in low_limits(sysctls, NO_GROUPS)] == [
        "kernel.pid_max",
        "kernel.pty.max",
        "fs.file-max",
    ]
    high = number(sysctls / "net/netfilter/nf_conntrack_max")
    raise_limits(sysctls, NO_GROUPS)
    assert low_limits(sysctls, NO_GROUPS) == []
    assert number(sysctls / "kernel/pid_max") == MINIMUMS["kernel/pid_max"]
    assert number(sysctls / "net/netfilter/nf_conntrack_max") == high


def test_what_this_kernel_does_not_have_is_not_low(sysctls: Path) -> None:
    (sysctls / "net/netfilter/nf_conntrack_max").unlink()
    (sysctls / "kernel/pty/max").unlink()
    raise_limits(sysctls, NO_GROUPS)
    assert not (sysctls / "kernel/pty/max").exists()


def test_what_cannot_be_raised_is_logged_with_the_command(
    sysctls: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (sysctls / "kernel/pty/max").unlink()
    # Nobody may write to it, not even root.
    (sysctls / "kernel/pty/max").symlink_to("/proc/sys/kernel/cap_last_cap")
    raise_limits(sysctls, NO_GROUPS)
    (warning,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert f"sysctl -w kernel.pty.max={MINIMUMS['kernel/pty/max']}" in warning
    assert number(sysctls / "kernel/pid_max") == MINIMUMS["kernel/pid_max"], "the others are"


def test_the_host_keeps_a_quarter_of_the_processes(sysctls: Path) -> None:
    assert max_processes(sysctls) == 5250
    (sysctls / "kernel/pid_max").write_text("4000\n")
    assert max_processes(sysctls) == 3000


@pytest.mark.parametrize("counted", [True, False])
def test_what_sockets_hold_is_bounded_by_memory_where_it_is_counted(
    sysctls: Path, tmp_path: Path, *, counted: bool
) -> None:
    """In cgroup v2 alone; with v1 the kernel's own bound stays."""
    (sysctls / "net/ipv4").mkdir()
    (sysctls / "net/ipv4/tcp_mem").write_text("1000\t2000\t3000\n")
    groups = tmp_path / "groups"
    groups.mkdir()
    if counted:
        (groups / "cgroup.controllers").touch()
    raise_limits(sysctls, groups)
    raised = [int(word) for word in (sysctls / "net/ipv4/tcp_mem").read_text().split()]
    assert raised == sorted(raised)
    assert (raised[-1] > 3000) == counted
    assert low_limits(sysctls, groups) == []
