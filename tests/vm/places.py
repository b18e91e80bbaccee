"""Where `make test-vm` keeps its files, and the only errors it ends with on purpose."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]


class VmError(Exception):
    """A machine could not be created, booted or reached; the message says why."""


@dataclass(frozen=True)
class Places:
    """One work directory. Everything that is made is below it."""

    root: Path

    @property
    def key(self) -> Path:
        """The private key that opens every guest; made for this directory alone."""
        return self.root / "id"

    @property
    def bases(self) -> Path:
        """State directories of this machine's own agent, with base images in them."""
        return self.root / "bases"

    def of(self, codename: str) -> Path:
        """The directory of one release's files."""
        return self.root / codename


def places_from(environment: dict[str, str] | None = None) -> Places:
    """The directory that ``ORKESTR_VM_DIR`` names, or its default; made if it is missing."""
    found = dict(os.environ) if environment is None else environment
    root = Path(found.get("ORKESTR_VM_DIR") or "/var/tmp/orkestr-vm").absolute()
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    return Places(root)
