"""Warm containers among what an installation has: their number follows what was asked for last.

What a killed agent leaves of them is in tests/host/test_warm_pool.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hostruntime.sandbox.warm_pool import PREFIX
from tests.faults.installation import Installation

_OWNER = re.compile(rf"{re.escape(PREFIX)}[0-9a-f]+")
_SLOT_NAME = re.compile(r"\bork\d+-[a-z](\d+)\b")


@dataclass(frozen=True)
class WarmContainers:
    """``taken`` maps the names of containers that waited to their sandboxes; ``slots`` are those
    of the containers that still wait."""

    taken: Mapping[str, str]
    slots: frozenset[int]

    @classmethod
    def of(cls, installation: Installation) -> WarmContainers:
        """Those that there are now."""
        taken, slots = {}, set()
        prefix = installation.instance.prefix
        for path in (installation.stack.layout.state_dir / "sandboxes").glob("*/sandbox.json"):
            if record := _read(path):
                taken[str(record.get("container", "")).removeprefix(prefix)] = path.parent.name
        for path in installation.run_dir.slots.glob("*.json"):
            record = _read(path)
            if record and str(record["owner"]).startswith(PREFIX):
                slots.add(int(str(record["index"])))
        return cls(taken, frozenset(slots))

    def has(self, text: str) -> bool:
        """Whether a path, a name or a line is that of a container that waits."""
        waits = any(owner not in self.taken for owner in _OWNER.findall(text))
        return waits or any(int(index) in self.slots for index in _SLOT_NAME.findall(text))

    def named(self, text: str) -> str:
        """The text with sandboxes' ids in place of the names that their containers had before."""
        return _OWNER.sub(lambda match: self.taken.get(match[0], match[0]), text)


def _read(path: Path) -> dict[str, object]:
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}
