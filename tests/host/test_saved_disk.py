"""Copies of a mounted disk: what makes each one to mount, and when that takes e2fsck(8)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostruntime.container import saved_disk
from hostruntime.container.disk import Disks
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, claim_instance, release_instance

pytestmark = [pytest.mark.host, pytest.mark.pythons]

SIZE_MB = 256
SUPERBLOCK, STATE = 1024, 0x3A


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    paths = StatePaths(tmp_path / "state").ensure()
    made = Disks(paths, claim_instance(paths))
    yield made
    for owner in made.owners():
        made.release(owner)
    release_instance(paths)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The copies that e2fsck was run on."""
    found: list[Path] = []
    real = saved_disk.repair

    def repair(saved: Path) -> None:
        found.append(saved)
        real(saved)

    monkeypatch.setattr(saved_disk, "repair", repair)
    return found


def wrong_with(copy: Path) -> list[str]:
    """What e2fsck finds, but for the superblock's counts: every mount counts anew."""
    done = subprocess.run(
        ["e2fsck", "-f", "-n", str(copy)], capture_output=True, text=True, check=False, timeout=120
    )
    lines = done.stdout.splitlines()
    said = [
        line for line in lines if "? no" in line or "differences" in line or "zero dtime" in line
    ]
    return said if done.returncode else []


def is_clean(copy: Path) -> bool:
    with copy.open("rb") as file:
        file.seek(SUPERBLOCK + STATE)
        return file.read(2) == b"\x01\x00"


def test_a_copy_is_whole_without_e2fsck_unless_a_file_was_deleted_while_it_is_open(
    disks: Disks, checked: list[Path], tmp_path: Path
) -> None:
    mounted = disks.attach("sbx_1", SIZE_MB)

    def copy(name: str) -> Path:
        target = tmp_path / name
        consistent = disks.save_unwritten("sbx_1", target)
        assert consistent, name
        saved_disk.finish(target, consistent=consistent)
        assert wrong_with(target) == [], name
        assert is_clean(target), name
        return target

    copy("empty")
    (mounted / "deep").mkdir()
    for number in range(1500):
        (mounted / "deep" / str(number)).write_bytes(b"x" * 5000)
    copy("many")
    for number in range(0, 1500, 2):
        (mounted / "deep" / str(number)).unlink()
    with (mounted / "open").open("wb", buffering=0) as file:
        file.write(bytes(100_000))
        last = copy("while one is written")
        assert checked == []
        (mounted / "open").unlink()
        assert checked == [copy("while a deleted one is open")]
    copy("after it was closed")
    # Of one that never had a name, too (O_TMPFILE in open(2)).
    unnamed = os.open(mounted, os.O_TMPFILE | os.O_RDWR, 0o600)
    copy("while an unnamed one is open")
    os.close(unnamed)
    assert len(checked) == 2
    # What nobody checked can be used like any other.
    again = disks.attach("sbx_2", SIZE_MB, last)
    assert len(list((again / "deep").iterdir())) == 750
    assert (again / "open").read_bytes() == bytes(100_000)
    assert disks.used("sbx_2")[1] < 800 + 11
    (again / "more").write_bytes(bytes(1_000_000))
    copy("of the first again")


def test_one_that_was_written_to_meanwhile_is_checked(
    disks: Disks, checked: list[Path], tmp_path: Path
) -> None:
    mounted, writes = disks.attach("sbx_1", SIZE_MB), iter([True])

    def write() -> None:
        if next(writes, False):
            (mounted / "late").write_bytes(b"x" * 5000)
            kernel.syncfs(mounted)

    target = tmp_path / "copy"
    consistent = disks.save_unwritten("sbx_1", target, write)
    assert not consistent
    saved_disk.finish(target, consistent=consistent)
    assert checked == [target]
    assert wrong_with(target) == []


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(STATE, b"\x03\x00", id="with errors"),
        pytest.param(0x60, b"\xc2\x12\x00\x00", id="of an unknown layout"),
        pytest.param(0x28, b"\x01\x00\x00\x00", id="with impossible numbers"),
        pytest.param(0x38, b"\x00\x00", id="no file system"),
    ],
)
def test_what_is_not_as_ours_are_is_not_taken_for_clean(
    disks: Disks, tmp_path: Path, offset: int, value: bytes
) -> None:
    disks.attach("sbx_1", SIZE_MB)
    target = tmp_path / "copy"
    assert disks.save_unwritten("sbx_1", target)
    with target.open("r+b") as file:
        file.seek(SUPERBLOCK + offset)
        file.write(value)
    assert not saved_disk._mark_clean(target)


def test_a_device_whose_requests_nobody_counts_is_not_relied_on(
    disks: Disks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disks.attach("sbx_1", SIZE_MB)
    monkeypatch.setattr(saved_disk, "device_writes", lambda _: None)
    assert not disks.save_unwritten("sbx_1", tmp_path / "copy")
