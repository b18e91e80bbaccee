"""How much space deleting an image would free, from a record written when it was built.

Images share files by hard links, and nothing else links to them. So deleting an image frees the
blocks of those of its inodes that no other image has. An image's inodes never change: they are
recorded once, beside the tree, in the file ``inodes``, with the image's own inodes separate from
those inherited from the image below (its base). The file is a header line of JSON, then four
arrays of 64-bit numbers: own inodes, their blocks, inherited inodes, their blocks.

An inode is only ever shared with images built over this one. While the image below is on disk,
deleting this image frees none of the inherited inodes, and of its own only those that no image
above has inherited; mostly there is no such image, and the sum in the header is the answer. Once
the image below is deleted, inodes that others inherited from the same ancestors count as well.
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
_MAX_HEADER_BYTES = 64 * 1024
_ITEM = array("Q").itemsize
# Precedes the oldest ancestor if that is known by name only: it may have ancestors itself.
_UNKNOWN = ""


@dataclass(frozen=True)
class InodeRecord:
    """An image's inode record.

    ``lineage`` has an id for each image below, the nearest last, and then one for the image itself:
    a random string, or the name of its directory for an image without a record.
    """

    directory: Path
    lineage: tuple[str, ...]
    own_blocks: int
    own_count: int
    inherited_count: int
    data_offset: int

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Read the record in an image's directory; None if there is no valid one.

        The record of a tree that was copied here from elsewhere is invalid: its inodes differ.
        """
        with (
            suppress(OSError, ValueError, KeyError, TypeError),
            (directory / NAME).open("rb") as file,
        ):
            header = json.loads(file.readline(_MAX_HEADER_BYTES))
            counts = header["own_count"], header["given_count"]
            complete = file.tell() + 2 * sum(counts) * _ITEM == os.fstat(file.fileno()).st_size
            same_tree = header["root_inode"] == (directory / "tree").lstat().st_ino
            if header["version"] == _VERSION and complete and same_tree:
                lineage = tuple(header["lineage"])
                return cls(directory, lineage, header["own_blocks"], *counts, file.tell())
        return None

    @property
    def lineage_id(self) -> str:
        """The image's own id in lineages."""
        return self.lineage[-1]

    def own(self) -> Inodes:
        """Return the image's own inodes.  Raises OSError."""
        return self._inodes(0, self.own_count)

    def inherited(self) -> Inodes:
        """Return the inodes inherited from the image below.  Raises OSError."""
        return self._inodes(self.own_count, self.inherited_count)

    def is_related(self, other: InodeRecord) -> bool:
        """Whether the two may share inodes: a common ancestor, or one built over the other."""
        roots = {self.lineage[0], other.lineage[0]}
        return len(roots) == 1 or _UNKNOWN in roots

    def _inodes(self, skip: int, count: int) -> Inodes:
        found = Inodes(array("Q"), array("Q"))
        with (self.directory / NAME).open("rb") as file:
            file.seek(self.data_offset + 2 * skip * _ITEM)
            found.numbers.frombytes(file.read(count * _ITEM))
            found.blocks.frombytes(file.read(count * _ITEM))
        return found


@dataclass(frozen=True)
class Inodes:
    """Inode numbers in order, and the disk blocks of each."""

    numbers: array[int]
    blocks: array[int]

    def blocks_without(self, others: Iterable[Inodes]) -> int:
        """Sum the blocks of inodes in none of ``others``, which is consumed lazily."""
        rest = set(self.numbers)
        for other in others:
            rest.difference_update(other.numbers)
            if not rest:
                return 0
        pairs = zip(self.numbers, self.blocks, strict=True)
        return sum(blocks for number, blocks in pairs if number in rest)


def write_inode_record(directory: Path, below: Path | None, found: Inventory) -> None:
    """Record the inodes of the unpublished image in ``directory``, as ``found`` in its tree.

    Inodes linked elsewhere are those inherited from the image in ``below``.  Raises OSError.
    """
    own, inherited = sorted(found.blocks.keys() - found.linked), sorted(found.linked)
    header = {
        "version": _VERSION,
        "lineage": [*_lineage_of(below), secrets.token_hex(12)],
        "own_blocks": sum(map(found.blocks.__getitem__, own)),
        "own_count": len(own),
        "given_count": len(inherited),
        "root_inode": (directory / "tree").lstat().st_ino,
    }
    with (directory / NAME).open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        for inodes in (own, inherited):
            _append(file, inodes, found.blocks)


def _lineage_of(directory: Path | None) -> tuple[str, ...]:
    if directory is None:
        return ()
    known = InodeRecord.read(directory)
    return known.lineage if known is not None else (_UNKNOWN, directory.name)


def _append(file: BinaryIO, inodes: list[int], blocks: Mapping[int, int]) -> None:
    array("Q", inodes).tofile(file)
    array("Q", map(blocks.__getitem__, inodes)).tofile(file)


def reclaimable_bytes(record: InodeRecord, directories: Collection[Path]) -> int | None:
    """Return the bytes that deleting an image frees; ``directories`` are all images on disk.

    None if a record it depends on is missing.  Raises OSError if an image is deleted meanwhile.
    """
    others = {path.name: InodeRecord.read(path) for path in directories if path != record.directory}
    known = [other for other in others.values() if other is not None]
    unknown = [path for path in directories if others.get(path.name, record) is None]
    present = {other.lineage_id for other in known} | others.keys()
    if any(_published_at(path) >= _published_at(record.directory) for path in unknown):
        return None  # It may have been built over this one.
    above = [other for other in known if record.lineage_id in other.lineage]
    freed = record.own_blocks
    if above:
        freed = record.own().blocks_without(other.inherited() for other in above)
    if len(record.lineage) > 1 and record.lineage[-2] not in present:
        if unknown:
            return None
        # Its inherited inodes are now its own, except those that other descendants share.
        related = [other for other in known if record.is_related(other)]
        freed += record.inherited().blocks_without(_shared_inodes(related, record))
    return freed * BLOCK_BYTES


def _published_at(directory: Path) -> int:
    return (directory / "image.json").stat().st_mtime_ns


def _shared_inodes(related: Collection[InodeRecord], record: InodeRecord) -> Iterator[Inodes]:
    """Yield inodes that others may share with an image's inherited ones.

    Their own inodes count only if they are below the image.
    """
    for other in related:
        yield other.inherited()
        if other.lineage_id in record.lineage:
            yield other.own()
