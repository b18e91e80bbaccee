"""Whose the host's state is, what nobody names, and what was set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hostruntime.wire.message import Message

_Name = Annotated[str, Field(min_length=1, max_length=100)]


@dataclass(frozen=True)
class Claim(Message):
    """What a database says of itself, and all of ``POST /installation/adopt``.

    ``previous`` is the mark before ``mark`` (:mod:`hostruntime.host.installation`).
    """

    id: _Name
    epoch: Annotated[int, Field(ge=0)]
    mark: _Name
    previous: str = ""


@dataclass(frozen=True)
class Agree(Claim):
    """``POST /installation/agree``; ``known`` says whether it knows what the host holds.

    None as long as nobody has looked.
    """

    known: bool | None = None


@dataclass(frozen=True)
class InstallationInfo(Message):
    """Which installation the host's state is of; ``mismatch`` is why nothing is reconciled."""

    id: str = ""
    epoch: int = 0
    mismatch: str = ""
    since: float | None = None


@dataclass(frozen=True)
class Reconcile(Message):
    """``POST /reconcile``: what is not among those named is surplus; None names all of a kind."""

    installation: Claim
    images: Sequence[str] | None = None
    snapshots: Sequence[str] | None = None


@dataclass(frozen=True)
class Reconciliation(Message):
    """The ids of what a pass set aside, and of what waits for the next one or an operator."""

    set_aside: Sequence[str] = ()
    waiting: Sequence[str] = ()


@dataclass(frozen=True)
class QuarantinedItemInfo(Message):
    """Something in quarantine; ``reason`` is unknown or damaged, ``detail`` says why in words.

    ``at`` is when it came there, ``size_bytes`` what its record said, None where that is not known.
    """

    key: str
    kind: str
    name: str
    reason: str
    detail: str
    at: float
    size_bytes: int | None = None


@dataclass(frozen=True)
class Quarantine(Message):
    """``GET /quarantine``, the oldest first."""

    quarantine: tuple[QuarantinedItemInfo, ...]
