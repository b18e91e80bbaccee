"""How many containers are admitted, by number, memory, processors and what is available."""

from __future__ import annotations

import pytest

from hostruntime.container.capacity import MAX_CONTAINERS, Capacity, Room, memory_bytes
from hostruntime.container.limits import Limits
from hostruntime.errors import HostFull, InvalidRequest
from hostruntime.host.ids import MAX_SLOTS

GIB = 1024**3
ROOM = Room(containers=3, memory_mb=4096, cpu=2.5, min_available_mb=512)
SMALL = Limits(cpu=0.5, memory_mb=1024)


def capacity(available: int = 8 * GIB, room: Room = ROOM) -> Capacity:
    return Capacity(room, lambda: available)


def refused(full: Capacity, limits: Limits = SMALL) -> str:
    before = full.status()
    with pytest.raises(HostFull) as caught:
        full.reserve("one.more", limits)
    assert full.status() == before, "nothing is reserved"
    return caught.value.detail


def test_one_more_than_there_may_be_is_refused_until_one_ends() -> None:
    full = capacity()
    for owner in ("one", "two", "three"):
        full.reserve(owner, SMALL)
    assert "ORKESTR_MAX_SANDBOXES" in refused(full)
    full.release("two")
    full.release("two")
    full.reserve("one.more", SMALL)
    assert full.status().containers == 3


def test_the_same_owner_is_counted_once() -> None:
    """Admitted before anything is made, and again when its container starts."""
    once = capacity()
    for _ in range(5):
        once.reserve("one", SMALL)
    assert (once.status().containers, once.status().memory_mb) == (1, 1024)


@pytest.mark.parametrize(
    ("limits", "setting"),
    [
        (Limits(cpu=0.1, memory_mb=3073), "ORKESTR_MEMORY_OVERCOMMIT"),
        (Limits(cpu=2.1, memory_mb=64), "ORKESTR_CPU_OVERCOMMIT"),
    ],
)
def test_what_exceeds_the_sum_is_refused_and_what_just_fits_is_not(
    limits: Limits, setting: str
) -> None:
    full = capacity()
    full.reserve("one", SMALL)
    assert setting in refused(full, limits)
    full.reserve("fits", Limits(cpu=2.0, memory_mb=3072))


def test_sums_of_fractions_fill_it_exactly() -> None:
    tenth = Limits(cpu=0.1, memory_mb=64)
    room = Room(containers=100, memory_mb=10_000, cpu=1.0, min_available_mb=0)
    full = capacity(room=room)
    for number in range(10):
        full.reserve(str(number), tenth)
    assert "ORKESTR_CPU_OVERCOMMIT" in refused(full, tenth)


def test_nothing_starts_while_the_memory_is_being_used() -> None:
    assert "511 MiB" in refused(capacity(available=512 * 1024**2 - 1))
    capacity(available=512 * 1024**2).reserve("one", SMALL)


def test_what_runs_already_is_counted_even_beyond_the_limits() -> None:
    """An agent may start again with smaller numbers."""
    full = capacity()
    for number in range(5):
        full.adopt(str(number), SMALL)
    assert full.status().containers == 5
    assert "All 3 sandboxes" in refused(full)


def test_the_defaults_fit_hundreds_of_small_sandboxes_on_an_ordinary_machine() -> None:
    room = Room.of_machine({})
    total = memory_bytes("MemTotal")
    assert 64 <= room.containers <= MAX_CONTAINERS < MAX_SLOTS
    assert room.memory_mb == pytest.approx(16 * total / 1024**2, rel=0.01)
    assert 256 <= room.min_available_mb <= 2048


def test_an_operator_may_want_two_thousand() -> None:
    assert Room.of_machine({"ORKESTR_MAX_SANDBOXES": "2000"}).containers == 2000
    most = Room.of_machine({"ORKESTR_MEMORY_OVERCOMMIT": "1", "ORKESTR_CPU_OVERCOMMIT": "1.5"})
    assert most.memory_mb == memory_bytes("MemTotal") // 1024**2


@pytest.mark.parametrize("text", ["many", "0", "-1", "2001", "nan", "inf", "1e9"])
def test_a_setting_that_is_no_number_of_its_range_is_named(text: str) -> None:
    with pytest.raises(InvalidRequest, match=f"ORKESTR_MAX_SANDBOXES is {text!r}"):
        Room.of_machine({"ORKESTR_MAX_SANDBOXES": text})


def test_what_was_promised_and_ended_leaves_nothing() -> None:
    full = capacity()
    empty = full.status()
    for number in range(1, 100):
        full.reserve("one", Limits(cpu=number / 100, memory_mb=64 + number))
        full.adopt("one", Limits(cpu=number / 70, memory_mb=64))
        full.release("one")
    assert full.status() == empty
