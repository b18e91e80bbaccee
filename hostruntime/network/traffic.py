"""What a slot has sent and received: the counters of its interface's host end."""

from __future__ import annotations

import os

_SMALL_FILE_BYTES = 64


def sent_and_received(host_end: str) -> tuple[int, int] | None:
    """The bytes that the container behind an interface has sent and received; None if it is gone.

    They count from the interface's creation, packets' headers included
    (Documentation/networking/statistics.rst). What the container sends is received here.
    """
    try:
        return _counter(host_end, "rx_bytes"), _counter(host_end, "tx_bytes")
    except OSError:
        return None


def _counter(interface: str, name: str) -> int:
    path = f"/sys/class/net/{interface}/statistics/{name}"
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, _SMALL_FILE_BYTES))
    finally:
        os.close(descriptor)
