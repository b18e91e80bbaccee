"""What deleting an image would give back, from figures kept when it was made.

Images share files by hard links, and nobody else links to them.  So an image gives back the blocks
of those of its inodes that no other image has.  Which it has never changes: they are written down
once, beside the tree, in the file ``inodes``, the image's own apart from those it was given by the
image it was made over.  A header line of JSON, then four arrays of 64-bit numbers: own inodes,
their blocks, given inodes, their blocks.

An inode goes from an image to those made over it and nowhere else.  While the image below is on
disk, what was given is not to be had back, and of the own inodes only those that no image made
over this one was given; mostly there is none, and the sum in the header is the answer.  When the
image below has gone, what others were given by the same ancestors is looked up as well.
"""

from __future__ import annotations

import json
import os
import secrets
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from hostruntime.image.trees import BLOCK_BYTES, Inventory

NAME = "inodes"
_VERSION = 1
_LONGEST_HEADER = 64 * 1024
_ITEM = array("Q").itemsize
# Before the oldest ancestor that is known by name only: there may be others.
_UNKNOWN = ""


@dataclass(frozen=True)
class Holdings:
    """An image's record.

    ``lineage`` has a word for each image below, the nearest last, and then for the image itself:
    a random one, or of an image without a record the name of its directory.
    """

    directory: Path
    lineage: tuple[str, ...]
    own_blocks: int
    own_count: int
    given_count: int
    arrays_at: int

    @classmethod
    def of(cls, directory: Path) -> Self | None:
        """The record in an image's directory; None where there is none that holds.

        A tree that was brought here from elsewhere has other inodes than its record says.
        """
        with (
            suppress(OSError, ValueError, KeyError, TypeError),
            (directory / NAME).open("rb") as file,
        ):
            header = json.loads(file.readline(_LONGEST_HEADER))
            counts = header["own_count"], header["given_count"]
            whole = file.tell() + 2 * sum(counts) * _ITEM == os.fstat(file.fileno()).st_size
            is_there = header["root_inode"] == (directory / "tree").lstat().st_ino
            if header["version"] == _VERSION and whole and is_there:
                lineage = tuple(header["lineage"])
                return cls(directory, lineage, header["own_blocks"], *counts, file.tell())
        return None

    @property
    def word(self) -> str:
        """What the image is called in lineages."""
        return self.lineage[-1]

    def own(self) -> Inodes:
        """Its own inodes.  Raises OSError."""
        return self._inodes(0, self.own_count)

    def given(self) -> Inodes:
        """The inodes it was given by the image below.  Raises OSError."""
        return self._inodes(self.own_count, self.given_count)

    def is_related(self, other: Holdings) -> bool:
        """Whether both may have something of a common ancestor, or one of the other."""
        roots = {self.lineage[0], other.lineage[0]}
        return len(roots) == 1 or _UNKNOWN in roots

    def _inodes(self, skip: int, count: int) -> Inodes:
        found = Inodes(array("Q"), array("Q"))
        with (self.directory / NAME).open("rb") as file:
            file.seek(self.arrays_at + 2 * skip * _ITEM)
            found.numbers.frombytes(file.read(count * _ITEM))
            found.blocks.frombytes(file.read(count * _ITEM))
        return found


@dataclass(frozen=True)
class Inodes:
    """Inode numbers in order, and the disk blocks of each."""

    numbers: array[int]
    blocks: array[int]

    def blocks_without(self, others: Iterable[Inodes]) -> int:
        """The blocks of those that none of the others has; no more are asked for than it takes."""
        rest = set(self.numbers)
        for other in others:
            rest.difference_update(other.numbers)
            if not rest:
                return 0
        pairs = zip(self.numbers, self.blocks, strict=True)
        return sum(blocks for number, blocks in pairs if number in rest)


def write_holdings(directory: Path, below: Path | None, found: Inventory) -> None:
    """Keep what the unpublished image in ``directory`` holds, ``found`` in its tree.

    What is linked elsewhere is what it was given by the image in ``below``.  Raises OSError.
    """
    own, given = sorted(found.blocks.keys() - found.linked), sorted(found.linked)
    header = {
        "version": _VERSION,
        "lineage": [*_lineage_of(below), secrets.token_hex(12)],
        "own_blocks": sum(map(found.blocks.__getitem__, own)),
        "own_count": len(own),
        "given_count": len(given),
        "root_inode": (directory / "tree").lstat().st_ino,
    }
    with (directory / NAME).open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for inodes in (own, given):
            _append(file, inodes, found.blocks)


def _lineage_of(directory: Path | None) -> tuple[str, ...]:
    if directory is None:
        return ()
    known = Holdings.of(directory)
    return known.lineage if known is not None else (_UNKNOWN, directory.name)


def _append(file: BinaryIO, inodes: list[int], blocks: Mapping[int, int]) -> None:
    array("Q", inodes).tofile(file)
    array("Q", map(blocks.__getitem__, inodes)).tofile(file)


def reclaimable_bytes(holdings: Holdings, directories: Collection[Path]) -> int | None:
    """How many bytes go with an image, where ``directories`` are those of all images on disk.

    None if that needs a record that is missing.  Raises OSError when an image goes meanwhile.
    """
    others = {path.name: Holdings.of(path) for path in directories if path != holdings.directory}
    known = [other for other in others.values() if other is not None]
    unknown = [path for path in directories if others.get(path.name, holdings) is None]
    there = {other.word for other in known} | others.keys()
    if any(_published_at(path) >= _published_at(holdings.directory) for path in unknown):
        return None  # It may have been made over this one.
    above = [other for other in known if holdings.word in other.lineage]
    freed = holdings.own_blocks
    if above:
        freed = holdings.own().blocks_without(other.given() for other in above)
    if len(holdings.lineage) > 1 and holdings.lineage[-2] not in there:
        if unknown:
            return None
        # What it was given is its own by now, but for what others have of the same ancestors.
        related = [other for other in known if holdings.is_related(other)]
        freed += holdings.given().blocks_without(_in_common(related, holdings))
    return freed * BLOCK_BYTES


def _published_at(directory: Path) -> int:
    return (directory / "image.json").stat().st_mtime_ns


def _in_common(related: Collection[Holdings], holdings: Holdings) -> Iterator[Inodes]:
    """What others may have that an image was given: their own only if they are below it."""
    for other in related:
        yield other.given()
        if other.word in holdings.lineage:
            yield other.own()
