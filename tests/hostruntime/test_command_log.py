"""What a background command prints, on disk: bounded, and true whatever of it is overwritten."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostruntime.container import command_log
from hostruntime.container.command_log import LogWriter, allocate, read


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of a hundred bytes, written ten at a time."""
    monkeypatch.setattr(command_log, "RING_BYTES", 100)
    monkeypatch.setattr(command_log, "MAX_WRITE_BYTES", 10)
    monkeypatch.setattr(command_log, "KEPT_BYTES", 90)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.mark.usefixtures("small")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=10)), st.integers(0, 400), st.integers(0, 120))
def test_a_part_is_of_what_was_written_and_from_where_it_says(
    log: int, pieces: list[bytes], offset: int, most: int
) -> None:
    os.ftruncate(log, 0)
    writer, written = LogWriter(log), b"".join(pieces)
    for piece in pieces:
        writer.write(piece)
    for _ in range(2):
        part = read(log, offset, most)
        assert part.size == writer.size == len(written)
        assert part.offset == min(max(offset, len(written) - 90, 0), len(written))
        assert part.data == written[part.offset :][:most]
        writer.finish()


def test_an_empty_file_is_an_empty_log(log: int) -> None:
    assert read(log, 5, 10) == command_log.Part(b"", 0, 0)


def test_it_has_all_its_space_from_the_start_and_gives_back_what_it_did_not_need(log: int) -> None:
    allocate(log)
    assert os.fstat(log).st_blocks * 512 >= command_log.RING_BYTES
    writer = LogWriter(log)
    writer.write(b"x" * 5000)
    writer.finish()
    assert os.fstat(log).st_blocks * 512 < 64 * 1024
    assert read(log, 0, 6000).data == b"x" * 5000


def test_whoever_reads_while_it_is_overwritten_gets_no_mixture(log: int) -> None:
    """Each mebibyte is of one letter; a part in which they are out of order would be of two."""
    writer, done = LogWriter(log), threading.Event()

    def write() -> None:
        for number in range(1200):
            writer.write(bytes([97 + number // 100]) * command_log.MAX_WRITE_BYTES)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not done.is_set():
            data = read(log, 0, 256 * 1024).data
            assert data == bytes(sorted(data))
    finally:
        thread.join()
