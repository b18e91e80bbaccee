"""Volumes: storage that outlives the sandboxes that use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hostruntime.wire.message import Message

# In MiB; the largest is what a file system of these blocks and this journal is tested with.
MIN_SIZE_MB, MAX_SIZE_MB = 256, 4 * 1024 * 1024


@dataclass(frozen=True)
class AttachVolume(Message):
    """The volume of a new sandbox, as a part of ``POST /sandboxes``.

    One that is ``new`` is created, with ``size_mb`` MiB, if the host doesn't have it.  Any other
    must be there: none is ever replaced by an empty one.
    """

    id: str
    size_mb: Annotated[int, Field(ge=MIN_SIZE_MB, le=MAX_SIZE_MB)]
    new: bool = False


@dataclass(frozen=True)
class VolumeInfo(Message):
    """A volume: its size, the host's bytes it occupies, and the sandbox that has it now."""

    id: str
    size_mb: int
    used_bytes: int
    sandbox: str | None = None


@dataclass(frozen=True)
class Volumes(Message):
    """``GET /volumes``."""

    volumes: tuple[VolumeInfo, ...]
