"""Commands that want all of one resource of a machine, for the tests and the benchmark."""

from __future__ import annotations

from collections.abc import Mapping

# Each goes on until it is stopped.
HOGS: Mapping[str, str] = {
    "fork bomb": "f() { f | f & }; (f) & while :; do :; done",
    # Each child is killed for what it took, and another takes its place.
    "memory hog": "while :; do head -c 2G /dev/zero | tail; done 2>/dev/null",
    "disk filler": (
        "while :; do dd if=/dev/zero of=/root/fill bs=1M 2>/dev/null; rm /root/fill; done"
    ),
    "inode filler": (
        "mkdir -p /root/d; while :; do for i in {1..20000}; do : > /root/d/$i || break; done "
        "2>/dev/null; rm -rf /root/d/*; done"
    ),
    "CPU spinner": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "output flood": "yes flood",
}
