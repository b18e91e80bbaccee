"""Ids of the host that containers are given (user_namespaces(7)), and how many there are.

A slot is one container's share of them; an instance has as many slots as it may run containers.
"""

from __future__ import annotations

MAX_INSTANCES = 8
# How many of them are used is a setting (hostruntime.container.capacity).
MAX_SLOTS = 2048
IDS_PER_SLOT = 65_536
ID_BASE = 1_000_000_000
ID_COUNT = MAX_INSTANCES * MAX_SLOTS * IDS_PER_SLOT
# Archives hold files with ids across all 31 bits, and tar(1) as root assigns files to them.  So the
# ids from IDS_PER_SLOT on are mapped too, identically for all slots: (inside, outside, count).
# They only own files: no process can have one as its real id (seccomp.py), and no two containers
# see the same file system.  Host ids end at 2^32 - 2, hence the number of instances.
# LXC needs one more id after the last, within a C int.
HIGH_IDS = (IDS_PER_SLOT, ID_BASE + ID_COUNT, 2**31 - 1 - IDS_PER_SLOT)
