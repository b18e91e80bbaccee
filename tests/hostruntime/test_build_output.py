"""A step's output: complete when small, bounded when large, paced, and readable at the end."""

from __future__ import annotations

import asyncio
import time

import pytest

from hostruntime.build.output import (
    BUDGET_BYTES,
    CHUNK_BYTES,
    HEAD_BYTES,
    MIN_HEAD_BYTES,
    RING_BYTES,
    TAIL_CHARACTERS,
    OutputBudget,
    StepOutput,
    readable_tail,
)


class Sink:
    def __init__(self, budget: OutputBudget | None = None) -> None:
        self.pieces: list[str] = []
        self.output = StepOutput(self.pieces.append, budget)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture
async def sink() -> Sink:
    return Sink()


async def test_small_output_arrives_whole_and_soon(sink: Sink) -> None:
    sink.output.feed(b"one\n")
    sink.output.feed(b"two\n")
    assert sink.pieces == []
    await asyncio.sleep(0.15)
    assert sink.pieces == ["one\ntwo\n"]
    sink.output.finish()
    assert sink.pieces == ["one\ntwo\n"]
    assert (sink.output.output_bytes, sink.output.elided_bytes) == (8, 0)


async def test_no_more_than_ten_pieces_a_second_while_it_runs(sink: Sink) -> None:
    began = time.monotonic()
    for _ in range(50):
        sink.output.feed(b"x")
        await asyncio.sleep(0.01)
    sink.output.finish()
    assert 3 <= len(sink.pieces) <= 2 + 10 * (time.monotonic() - began)
    assert sink.text == "x" * 50


async def test_exactly_nine_mebibytes_are_kept_whole(sink: Sink) -> None:
    data = b"0123456789abcdef" * (9 * 1024 * 64)
    sink.output.feed(data)
    sink.output.finish()
    assert sink.text == data.decode()
    assert sink.output.elided_bytes == 0
    assert max(len(piece.encode()) for piece in sink.pieces) <= CHUNK_BYTES


@pytest.mark.parametrize("chunk", [8, 1000, 65_536, 3_000_000])
async def test_the_middle_of_more_is_left_out_and_said_so(sink: Sink, chunk: int) -> None:
    data = b"".join(b"%07d\n" % number for number in range(1_400_000))
    for start in range(0, len(data), chunk):
        sink.output.feed(data[start : start + chunk])
    sink.output.finish()
    elided = len(data) - HEAD_BYTES - RING_BYTES
    assert sink.output.elided_bytes == elided
    note = f"[… {elided:,} bytes of output omitted here"
    before, _, after = sink.text.partition(f"\n{note}")
    assert before == data[:HEAD_BYTES].decode()
    assert after.partition("…]\n")[2] == data[-RING_BYTES:].decode()
    assert after.startswith(": the first 8 MiB and the last 1 MiB of a step are kept …]\n")
    assert sink.output.tail().endswith("1399999")


async def test_the_steps_of_a_build_share_what_their_beginnings_may_take() -> None:
    budget, data = OutputBudget(), b"0123456\n" * (2 * 1024 * 1024)
    kept = []
    for _ in range(6):
        sink = Sink(budget)
        sink.output.feed(data)
        sink.output.finish()
        kept.append(len(sink.text.partition("\n[…")[0]))
        assert sink.text.endswith(data[-RING_BYTES:].decode())
    assert kept == [HEAD_BYTES] * 4 + [MIN_HEAD_BYTES] * 2
    assert sum(kept[:4]) == BUDGET_BYTES
    assert "the first 64 KiB and the last 1 MiB" in sink.text


async def test_a_quiet_step_leaves_the_others_their_share() -> None:
    budget = OutputBudget(HEAD_BYTES + 10)
    first = Sink(budget)
    first.output.feed(b"x" * 10)
    first.output.finish()
    assert budget.allowance() == HEAD_BYTES


async def test_characters_split_between_chunks_are_put_together(sink: Sink) -> None:
    for byte in "é€😀".encode():
        sink.output.feed(bytes([byte]))
    sink.output.finish()
    assert sink.text == "é€😀"


async def test_a_cut_in_the_middle_of_characters_leaves_no_rubbish(sink: Sink) -> None:
    sink.output.feed("😀".encode() * 2_400_000 + b"!")
    sink.output.finish()
    assert sink.text.count("\ufffd") <= 1
    assert sink.text.endswith("😀!")


async def test_binary_output_is_text_without_nul(sink: Sink) -> None:
    sink.output.feed(bytes(range(256)) * 1000)
    sink.output.finish()
    assert "\0" not in sink.text
    sink.text.encode()
    assert max(len(piece.encode()) for piece in sink.pieces) <= CHUNK_BYTES


async def test_a_partial_character_at_the_end_is_replaced(sink: Sink) -> None:
    sink.output.feed(b"end \xe2\x82")
    sink.output.finish()
    assert sink.text == "end \ufffd"


def test_the_tail_is_the_last_twenty_lines() -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    assert readable_tail(text).splitlines() == [f"line {number}" for number in range(80, 100)]


def test_the_tail_is_at_most_two_thousand_characters() -> None:
    tail = readable_tail("x" * 10_000)
    assert tail == "…" + "x" * TAIL_CHARACTERS


def test_the_tail_shows_what_a_terminal_would() -> None:
    text = "\x1b[31mERROR\x1b[0m: no\r\n  0%\r 50%\r100%\r\n\x1b]0;title\x07done\x1b[K\n\n\n"
    assert readable_tail(text) == "ERROR: no\n100%\ndone"


def test_the_tail_hides_no_character_that_a_message_quotes() -> None:
    said = "bash: line 1: set: -\r: invalid option\n/usr/bin/env: ‘python3\r’: No such file\n"
    assert readable_tail(said) == (
        "bash: line 1: set: -⟨U+000D⟩: invalid option\n"
        "/usr/bin/env: ‘python3⟨U+000D⟩’: No such file"
    )


def test_an_empty_tail_is_empty() -> None:
    assert readable_tail("\n\n") == ""
