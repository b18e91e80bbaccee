"""Records replace one another whole: for readers, for a writer that dies, and for a power cut."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hostruntime.host.writing import write_atomically


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and renamed, in order."""
    seen: list[str] = []
    flush, rename = os.fsync, Path.rename

    def note_flush(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        seen.append("flush directory" if path.is_dir() else f"flush {path.read_text()}")
        flush(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        seen.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "rename", note_rename)
    return seen


def test_what_is_to_last_is_on_disk_before_it_has_its_name(tmp_path: Path, done: list[str]) -> None:
    write_atomically(tmp_path / "record", b"new", durable=True)
    assert done == ["flush new", "rename", "flush directory"]


def test_what_is_not_to_last_costs_no_flush(tmp_path: Path, done: list[str]) -> None:
    write_atomically(tmp_path / "record", b"new")
    assert done == ["rename"]


def test_a_writer_that_fails_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    record.write_text("old")

    def fail(path: Path, target: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(record, b"new", durable=True)
    assert [path.name for path in tmp_path.iterdir()] == ["record"]
    assert record.read_text() == "old"


def test_several_threads_may_write_the_same_record_at_once(tmp_path: Path) -> None:
    """As the first containers of an agent do, which all need the same profile."""
    path, together = tmp_path / "record", threading.Barrier(8)

    def write(number: int) -> None:
        for _ in range(50):
            together.wait(60)
            write_atomically(path, b"%d" % number * 1000)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(write, range(8))) == [None] * 8
    assert len(set(path.read_bytes())) == 1
    assert list(tmp_path.iterdir()) == [path]
