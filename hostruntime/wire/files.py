"""Files in a sandbox."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hostruntime.wire.message import Message


@dataclass(frozen=True)
class MakeDirectory(Message):
    """``POST /sandboxes/{id}/files/mkdir``."""

    path: str
    parents: bool = True


@dataclass(frozen=True)
class MoveFile(Message):
    """``POST /sandboxes/{id}/files/move``."""

    source: str
    destination: str


@dataclass(frozen=True)
class WrittenFile(Message):
    """What ``PUT /sandboxes/{id}/files`` wrote."""

    path: str
    size: int


@dataclass(frozen=True)
class EditFile(Message):
    """``POST /sandboxes/{id}/files/edit``: replace ``old``, which occurs ``count`` times.

    Without ``count``, however often it does, but at least once.
    """

    path: str
    old: str
    new: str
    count: int | None = 1


@dataclass(frozen=True)
class EditedFile(Message):
    """An edited file, its new size in bytes, and on which ``line`` the first edit is."""

    path: str
    size: int
    count: int
    line: int


@dataclass(frozen=True)
class FileStat(Message):
    """The stat of a path; unless it ``exists``, the other fields are meaningless."""

    path: str
    exists: bool
    is_dir: bool = False
    size: int = 0
    mode: int = 0
    modified_at: float = 0.0


@dataclass(frozen=True)
class WantedPart:
    """Which bytes of a file: from ``first`` to ``last``, both included, or to its end.

    Without ``first``, the ``last`` so many; without either, all of them.  With ``line``, that line
    instead, and as many as ``lines`` says in all; a negative one counts from the last.  In any case
    no more than the first ``most`` bytes of them.
    """

    first: int | None = None
    last: int | None = None
    line: int | None = None
    lines: int | None = None
    most: int | None = None


@dataclass(frozen=True)
class FilePart(Message):
    """A part of a file: ``length`` bytes from offset ``first``; all of it has ``stat.size``."""

    stat: FileStat
    first: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class DirectoryEntry(Message):
    """One name in a directory; ``mode`` holds the permission bits, ``modified_at`` Unix seconds."""

    name: str
    is_dir: bool
    size: int
    mode: int
    modified_at: float


@dataclass(frozen=True)
class DirectoryEntries(Message):
    """The response to ``GET /sandboxes/{id}/files`` for a directory, sorted by name."""

    entries: tuple[DirectoryEntry, ...]


@dataclass(frozen=True)
class Survey(Message):
    """From inside a container: the beginning of a file, and the names in some directories.

    None for what cannot be read; ``head`` is hexadecimal.  A directory of too many names is none.
    """

    head: str | None
    names: tuple[tuple[str, ...] | None, ...]


@dataclass(frozen=True)
class FileContent:
    """A complete file; its stat is in the response headers."""

    stat: FileStat
    content: bytes


@dataclass(frozen=True)
class DirectoryListing:
    """The entries of a directory, sorted by name."""

    stat: FileStat
    entries: tuple[DirectoryEntry, ...]
