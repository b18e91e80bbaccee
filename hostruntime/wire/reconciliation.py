"""The installation that the host's state belongs to, reconciliation and quarantine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hostruntime.wire.message import Message

_Name = Annotated[str, Field(min_length=1, max_length=100)]


@dataclass(frozen=True)
class Claim(Message):
    """A database's identity, and the body of ``POST /installation/adopt``.

    ``previous`` is the mark before ``mark`` (:mod:`hostruntime.host.installation`).
    """

    id: _Name
    epoch: Annotated[int, Field(ge=0)]
    mark: _Name
    previous: str = ""


@dataclass(frozen=True)
class Agree(Claim):
    """``POST /installation/agree``; ``known`` says whether the database knows what the host holds.

    None if that has not been checked yet.
    """

    known: bool | None = None


@dataclass(frozen=True)
class InstallationInfo(Message):
    """The installation the host's state belongs to; ``mismatch`` is why nothing is reconciled."""

    id: str = ""
    epoch: int = 0
    mismatch: str = ""
    since: float | None = None


@dataclass(frozen=True)
class Reconcile(Message):
    """``POST /reconcile``: everything not named is surplus; None names all of a kind."""

    installation: Claim
    images: Sequence[str] | None = None
    snapshots: Sequence[str] | None = None


@dataclass(frozen=True)
class Reconciliation(Message):
    """The ids of what a pass set aside, and of what is left for the next one or an operator."""

    set_aside: Sequence[str] = ()
    waiting: Sequence[str] = ()


@dataclass(frozen=True)
class QuarantinedItemInfo(Message):
    """An item in quarantine; ``reason`` is unknown or damaged, ``detail`` a sentence that says why.

    ``at`` is when it was set aside, ``size_bytes`` the size in its record, None if unknown.
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
    """``GET /quarantine``, oldest first."""

    quarantine: tuple[QuarantinedItemInfo, ...]
