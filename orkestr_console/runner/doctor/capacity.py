"""How many sandboxes this machine is set to take, and whether it can."""

from __future__ import annotations

from hostruntime.container.capacity import MAX_SETTING, Room, memory_bytes
from hostruntime.errors import InvalidRequest
from orkestr_console.runner.doctor.finding import Finding
from orkestr_console.runner.layout import Layout

# What an idle sandbox takes (tests/benchmarks/fleet.py), rounded up.
_IDLE_BYTES = 4 * 1024 * 1024
_GIB = 1024**3


def check_capacity(_: Layout) -> Finding:
    """The settings of hostruntime.container.capacity, and what that many idle sandboxes take."""
    try:
        room = Room.of_machine()
    except InvalidRequest as error:
        return Finding("capacity", "fail", error.detail, "change it, or unset it for the default")
    seen = (
        f"{room.containers} sandboxes and builds at once, which may be promised "
        f"{room.memory_mb / 1024:.0f} GiB and {room.cpu:g} processors together"
    )
    memory = memory_bytes("MemTotal")
    if room.containers * _IDLE_BYTES <= memory / 2:
        return Finding("capacity", "ok", seen)
    needed = room.containers * _IDLE_BYTES / _GIB
    seen += f"; idle, they take {needed:.1f} of this machine's {memory / _GIB:.1f} GiB"
    fitting = int(memory / 2 / _IDLE_BYTES)
    return Finding("capacity", "warn", seen, f"set {MAX_SETTING} to {fitting} or less")
