"""A confined program reaches what it needs of a private directory, and nothing else of it."""

from __future__ import annotations

import os
import select
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.host import kernel
from orkestr_console.runner.confine import (
    blocked_directory,
    mount_points,
    outermost,
    unneeded_mounts,
)

NOBODY = "nobody"


@pytest.fixture
def private() -> Iterator[Path]:
    """A directory that only root may enter, on a filesystem that others can reach."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        home = Path(name) / "home"
        (home / "tree" / "var").mkdir(parents=True)
        (home / "tree" / "code").write_text("print('hello')\n")
        (home / "secret").write_text("hidden\n")
        (home / "secret").chmod(0o644)
        Path(name).chmod(0o755)
        home.chmod(0o700)
        yield home


def confining(need: Path, *command: str) -> list[str]:
    """The command line that runs ``command`` confined to ``need``."""
    confine = [sys.executable, "-m", "orkestr_console.runner.confine", "--user", NOBODY]
    return [*confine, "--need", str(need), "--", *command]


def confined(need: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(confining(need, "/bin/sh", "-c", script), capture_output=True, text=True)


def test_the_directory_that_blocks_is_the_outermost_closed_one(private: Path) -> None:
    assert blocked_directory(NOBODY, private / "tree" / "var") == private
    assert blocked_directory("root", private / "tree") is None
    assert blocked_directory(NOBODY, Path("/usr/bin")) is None


def test_a_confined_program_reads_its_need_and_no_neighbour(private: Path) -> None:
    script = f"cat {private}/tree/code; ls {private}; cat {private}/secret; id -un"
    done = confined(private / "tree", script)
    assert done.stdout == f"print('hello')\ntree\n{NOBODY}\n"
    assert "secret: No such file" in done.stderr


def test_a_confined_program_has_no_capabilities_and_gets_none(private: Path) -> None:
    done = confined(private / "tree", "grep -E '^(Cap|NoNewPrivs)' /proc/self/status")
    values = dict(line.split(":\t") for line in done.stdout.splitlines())
    assert values.pop("NoNewPrivs") == "1"
    assert set(values.values()) == {"0" * 16}


def test_confinement_leaves_no_mount_behind(private: Path) -> None:
    """Nor takes one away, seen where mounts are shared with who is below, as under systemd.

    In a namespace of the test's own: on the machine others come and go all the time.
    """
    before, after, own = (private.parent / name for name in ("before", "after", "own"))
    own.mkdir()
    confine = shlex.join(confining(private / "tree", "/bin/true"))
    script = f"""
        mount --make-rshared / && mount -t tmpfs orkestr-test {own} || exit 9
        cat /proc/self/mountinfo >{before}; {confine} || exit; cat /proc/self/mountinfo >{after}
    """
    alone = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script]
    subprocess.run(alone, check=True)
    assert mounts_of(after) - mounts_of(before) == set()
    assert own in mount_points(after.read_text())


def mounts_of(mountinfo: Path) -> set[str]:
    """The ids of the mounts in a copy of ``/proc/self/mountinfo`` (proc(5))."""
    return {line.split()[0] for line in mountinfo.read_text().splitlines()}


def test_a_mount_made_by_another_is_not_kept_alive(private: Path) -> None:
    """Unmounting a sandbox's root must free it although a confined program runs on."""
    other = private / "tree" / "var"
    subprocess.run(["mount", "-t", "tmpfs", "other", other], check=True)
    try:
        done = confined(private / "tree", "cat /proc/self/mountinfo")
    finally:
        subprocess.run(["umount", other], check=True)
    assert done.returncode == 0
    assert str(other) not in done.stdout


def test_the_work_of_confining_grows_with_the_mounts_and_not_with_their_square(
    private: Path,
) -> None:
    """Hundreds of sandboxes have thousands of mounts, and a web process that ended is awaited."""
    few, many = (work_among(private, mounts) for mounts in (300, 3000))
    assert many < 14 * few


def work_among(private: Path, mounts: int) -> float:
    """The processor time in seconds of confining a program where there are so many mounts."""
    own = private.parent / f"own{mounts}"
    own.mkdir()
    script = f"""
import os, resource, subprocess
from pathlib import Path
from hostruntime.host import kernel
for number in range({mounts}):
    path = Path({str(own)!r}, str(number))
    path.mkdir()
    kernel.mount("orkestr-test", path, "tmpfs", 0, "size=4k")
def spent():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
def confine(*command):
    before = spent()
    left = subprocess.run([*{confining(private / "tree")!r}, *command], capture_output=True)
    assert left.returncode == 0, left.stderr
    return spent() - before, left.stdout
assert {str(own)!r} not in confine("cat", "/proc/self/mountinfo")[1].decode()
print(min(confine("true")[0] for _ in range(2)))
"""
    alone = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", script]
    done = subprocess.run(alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_outermost_keeps_no_path_inside_another() -> None:
    paths = [Path("/a/b"), Path("/a"), Path("/ab"), Path("/a/b/c"), Path("/a")]
    assert outermost(paths) == [Path("/a"), Path("/ab")]


def test_mounts_that_lead_to_a_need_or_the_system_stay() -> None:
    mounts = ["/", "/proc", "/sys/fs/cgroup", "/home", "/srv", "/srv/data", "/run/netns", "/tmp"]
    needs = [Path("/home/me/tree")]
    doomed = unneeded_mounts(map(Path, mounts), needs)
    assert doomed == [Path("/run/netns"), Path("/srv")]


def test_mount_points_undo_the_kernels_octal_escapes() -> None:
    line = r"36 35 98:0 / /mnt/with\040space rw - ext4 /dev/x rw"
    assert mount_points(line + "\n") == [Path("/mnt/with space")]


def test_a_confined_program_dies_with_its_parent(private: Path) -> None:
    """supervisord killed with -9 must not leave PostgreSQL, web or worker running."""
    read, write = os.pipe()
    sleeper = confining(private / "tree", "/bin/bash", "-c", f"echo up >&{write}; exec sleep 600")
    parent = f"""
import os, subprocess, sys
child = subprocess.Popen({sleeper!r}, pass_fds=[{write}])
os.close({write})
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, pass_fds=[write]
    )
    os.close(write)
    up = os.read(read, 3)
    process.communicate()
    assert (up, process.returncode) == (b"up\n", 0)
    # The write end closes when the last process that has it, the sleeper, has died.
    assert select.select([read], [], [], 30)[0] == [read]
    assert os.read(read, 1) == b""
    os.close(read)


def test_mounts_that_come_and_go_meanwhile_are_no_failure(private: Path) -> None:
    """As the disks of sandboxes do, on a busy machine."""
    over = threading.Event()
    rounds = 0

    def churn(target: Path) -> None:
        nonlocal rounds
        while not over.is_set():
            target.mkdir()
            kernel.mount("orkestr-test", target, "tmpfs", 0)
            kernel.umount(target)
            target.rmdir()
            rounds += 1

    names = [private.parent / f"churn{number}" for number in range(3)]
    threads = [threading.Thread(target=churn, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    try:
        done = [confined(private / "tree", "echo fine") for _ in range(4)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert [(one.stdout, one.stderr) for one in done] == [("fine\n", "")] * 4
    assert rounds > 20
