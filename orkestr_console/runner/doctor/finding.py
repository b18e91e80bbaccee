"""The result of a check, and helpers that several checks share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]

AS_ROOT = "run it as root, or with sudo"


@dataclass(frozen=True)
class Finding:
    """One check's verdict, details, and what to do unless it is ok."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""


def needs_root(name: str) -> Finding:
    """The finding of a check that only root can make."""
    return Finding(name, "warn", "cannot be seen without root", AS_ROOT)


def is_root() -> bool:
    """Whether this process runs as root."""
    return os.geteuid() == 0


def existing_ancestor(path: Path) -> Path:
    """``path``, or its nearest existing ancestor."""
    return path if path.exists() else existing_ancestor(path.parent)


def read_number(path: Path) -> int:
    """The number in a sysctl file; 0 if there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
