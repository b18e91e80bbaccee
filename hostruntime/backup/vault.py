"""Images and snapshots in a backup: copied once, found again by name, told by their digest.

In the backup's directory (root's, 0700)::

    images/<name>/content/       an image as in the store, but for who uses it
    images/<name>/entry.json     its digest and sizes
    snapshots/<id>/…             the same
    .partial/                    what is being copied; never counts

``<name>`` is that of the image's directory in the store, a base's with its generation.  What was
published there never changes, so what has been copied is never copied again.  Files of several
images that are one file by hard links are one file in the backup too, and again after a restore
(:mod:`hostruntime.backup.replicas`).

The console may run meanwhile.  What is deleted while it is copied is found to have gone, by its
path leading nowhere when the copy is held against it, and is left out and named.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from hostruntime.backup.replicas import Replicas
from hostruntime.build.layers import DISK_FILE, TMPFS_FILE
from hostruntime.errors import HostFault, ImageNotFound
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, write_json
from hostruntime.host.progress import Progress
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.image.digest import image_digest
from hostruntime.image.store import CONTENTS_FILE, read_image
from hostruntime.image.trees import Check, TreeTooDeep, no_check
from hostruntime.sandbox.snapshots import image_user, read_snapshot

Kind = Literal["images", "snapshots"]
PARTIAL = ".partial"
_CONTENT, _ENTRY = "content", "entry.json"
_CONDEMNED, _USERS = "condemned", "users"
# The rest says who uses a thing here and now, or which inodes it has on this disk.
_PARTS: dict[Kind, frozenset[str]] = {
    "images": frozenset({"tree", "image.json", CONTENTS_FILE}),
    "snapshots": frozenset({DISK_FILE, TMPFS_FILE, "snapshot.json"}),
}
_RECORDS: dict[Kind, str] = {"images": "image.json", "snapshots": "snapshot.json"}


@dataclass(frozen=True)
class Stored:
    """One image or snapshot of a backup.

    ``digest`` is that of its content (:mod:`hostruntime.image.digest`).  Of an image, ``users`` are
    the snapshots that use it, ``alias`` is the name of the base that it is now, and ``condemned``
    says that it has been deleted and is there for its users alone.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    kind: Kind
    name: str
    digest: str
    users: list[str] = field(default_factory=list)
    alias: str = ""
    condemned: bool = False

    @property
    def path(self) -> str:
        """Where it is, from the backup's directory."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Sum:
    """What ``entry.json`` says."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    digest: str


@dataclass
class Taken:
    """What :meth:`Vault.take` did.  ``lost`` was asked for and cannot be had."""

    stored: list[Stored] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Damaged(HostFault):
    """What is in the backup is not what was put there."""


@dataclass(frozen=True)
class _Original:
    """What is to be copied: its directory in the state, and what else is known of it."""

    kind: Kind
    path: Path
    users: list[str] = field(default_factory=list)
    alias: str = ""
    condemned: bool = False

    @property
    def word(self) -> str:
        return f"the {self.kind.removesuffix('s')} {self.path.name}"

    def stored(self, digest: str) -> Stored:
        return Stored(self.kind, self.path.name, digest, self.users, self.alias, self.condemned)


_SUM = TypeAdapter(Sum)
Names = Collection[str]


class Vault:
    """The images and snapshots in one backup directory; its owner sees that no other writes there.

    ``check`` is called between the pieces of long work, and may end it by raising.
    """

    def __init__(self, root: Path, check: Check = no_check) -> None:
        self.root = root
        self.check = check
        self.progress = Progress()
        self._replicas = Replicas(check, self.progress)
        # The contents of files with several names, by inode: of the originals, and of the copies.
        self._originals: dict[int, bytes] = {}
        self._copies: dict[int, bytes] = {}

    def prepare(self) -> None:
        """Make the directories, and drop what was not finished.  Raises OSError."""
        for name in ("images", "snapshots"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)
        self.clear_partial()

    def clear_partial(self) -> None:
        """Drop what was not finished.  Raises OSError."""
        if (self.root / PARTIAL).exists():
            shutil.rmtree(self.root / PARTIAL)

    # Taking --------------------------------------------------------------------------------

    def take(self, paths: StatePaths, images: Names, snapshots: Names) -> Taken:
        """Copy what is new of these images and snapshots, and of all bases there are.

        Raises Damaged, TreeTooDeep, OSError, and what the check does; a repeat goes on from there.
        """
        taken = Taken()
        originals = _images(paths, images, snapshots)
        there = {one.path.name for one in originals if not one.condemned}
        gone = [_Original("images", paths.images / name) for name in sorted(set(images) - there)]
        originals += [_Original("snapshots", paths.snapshots / name) for name in sorted(snapshots)]
        kept = {one.path for one in originals if self._has(one)}
        if len(kept) < len(originals):
            self._learn([one for one in originals if one.path in kept])
        for one in originals:
            digest = self._digest(one) if one.path in kept else self._copy(one)
            if digest is None:
                gone.append(one)
                continue
            taken.stored.append(one.stored(digest))
            if one.path not in kept:
                taken.copied.append(one.word)
        taken.lost = [one.word for one in gone]
        return taken

    def _has(self, one: _Original) -> bool:
        """Whether this very thing has been copied before."""
        record, kept = _RECORDS[one.kind], self._place(one)
        try:
            same = (one.path / record).read_bytes() == (kept / _CONTENT / record).read_bytes()
            return same and read_record(kept / _ENTRY, _SUM) is not None
        except (OSError, BadRecord):
            return False

    def _learn(self, kept: Sequence[_Original]) -> None:
        for one in kept:
            with suppress(FileNotFoundError):  # Deleted meanwhile.
                self._replicas.learn(one.path, self._place(one) / _CONTENT)

    def _digest(self, one: _Original) -> str:
        found = read_record(self._place(one) / _ENTRY, _SUM)
        if found is None:
            raise Damaged(f"{self._place(one)} has just lost its {_ENTRY}: somebody removes files.")
        return found.digest

    def _copy(self, one: _Original) -> str | None:
        """Copy it, and hold the copy against it; its digest, None if it cannot be had any more."""
        if not _is_whole(one):
            return None
        inode = one.path.stat().st_ino
        self.clear_partial()
        partial = self.root / PARTIAL
        partial.mkdir(mode=0o700)
        try:
            digest = self._copied(one, partial / _CONTENT)
        except (OSError, Damaged) as fault:
            if not self._is_lost(one, inode, fault):
                raise
            self._replicas.forget()
            self._copies.clear()
            self.clear_partial()
            return None
        write_json(partial / _ENTRY, asdict(Sum(digest)))
        kernel.syncfs(partial)
        self._publish(partial, self._place(one))
        return digest

    def _copied(self, one: _Original, copy: Path) -> str:
        """Copy it and hold the copy against it; the digest of both.  Raises Damaged, OSError.

        Nothing is deleted but by a rename first: an original that is opened by its path after it
        was copied was whole until then.
        """
        self._replicas.copy(one.path, copy, _PARTS[one.kind])
        digest = self._digest_of(one.kind, one.path, self._originals)
        if self._digest_of(one.kind, copy, self._copies) != digest:
            raise Damaged(
                f"The copy of {one.word} is not what was copied: the disk of {self.root} is "
                "damaged, or files of an older copy there, which this one shares, are. "
                "`backup --verify` names those; use a new directory until it names none."
            )
        return digest

    def _is_lost(self, one: _Original, inode: int, fault: Exception) -> bool:
        """Whether a copy failed because the original has gone, or the disk cannot read it."""
        if not _still_is(one.path, inode):
            return True
        if not isinstance(fault, OSError) or fault.errno != errno.EIO:
            return False
        try:
            self._digest_of(one.kind, one.path, {})
        except OSError:
            return True
        return False

    def _publish(self, partial: Path, place: Path) -> None:
        if place.exists():
            # Of another thing, or without its sum.
            shutil.rmtree(place)
        partial.rename(place)
        self._replicas.moved(place / _CONTENT)
        kernel.fsync(place.parent)

    def _digest_of(self, kind: Kind, tree: Path, linked: dict[int, bytes]) -> str:
        return image_digest(tree, check=self.check, linked=linked, only=_PARTS[kind])

    def _place(self, one: _Original | Stored) -> Path:
        name = one.path.name if isinstance(one, _Original) else one.name
        return self.root / one.kind / name

    # Checking and bringing back --------------------------------------------------------------

    def damaged(self, stored: Iterable[Stored]) -> list[str]:
        """Which of these are not what was put there, as paths with the reason.

        Raises what the check does.
        """
        found = []
        for one in stored:
            tree = self._place(one) / _CONTENT
            try:
                if self._digest_of(one.kind, tree, self._copies) != one.digest:
                    found.append(f"{one.path}: it is not what was put there")
            except FileNotFoundError:
                found.append(f"{one.path}: it is not there")
            except (OSError, TreeTooDeep) as error:
                found.append(f"{one.path}: it cannot be read ({error})")
        return found

    def restore(self, stored: Iterable[Stored], paths: StatePaths) -> None:
        """Put these into a state directory that has none of them.

        Raises TreeTooDeep, OSError, and what the check does; what is there then is not whole.
        """
        replicas = Replicas(self.check, self.progress)
        for one in stored:
            directory = paths.root / one.kind / one.name
            replicas.copy(self._place(one) / _CONTENT, directory)
            if one.users:
                (directory / _USERS).mkdir(mode=0o700)
            for user in one.users:
                (directory / _USERS / user).touch(mode=0o600)
            if one.condemned:
                (directory / _CONDEMNED).touch(mode=0o600)
            if one.alias:
                (paths.images / one.alias).symlink_to(one.name)
        kernel.syncfs(paths.root)

    def prune(self, keep: Collection[str]) -> list[str]:
        """Remove what none of these paths names; return what was.  Raises OSError."""
        there = [*self.root.glob("images/*"), *self.root.glob("snapshots/*")]
        surplus = [path for path in there if f"{path.parent.name}/{path.name}" not in keep]
        for path in surplus:
            self.clear_partial()
            # By one rename, so that nothing is ever half there.
            path.rename(self.root / PARTIAL)
        self.clear_partial()
        return [f"{path.parent.name}/{path.name}" for path in surplus]


def _images(paths: StatePaths, images: Names, snapshots: Names) -> list[_Original]:
    """The images there are of those, the bases, and what snapshots are made over; oldest first."""
    users = {image_user(name) for name in snapshots}
    aliases = {
        str(entry.readlink()): entry.name
        for entry in paths.images.iterdir()
        if entry.is_symlink() and not entry.name.startswith(".")
    }
    found = []
    for path in paths.images.glob("[!.]*"):
        if path.is_symlink():
            continue
        using = sorted(user.name for user in path.glob(f"{_USERS}/*") if user.name in users)
        condemned = (path / _CONDEMNED).exists()
        one = _Original("images", path, using, aliases.get(path.name, ""), condemned)
        if using or one.alias or (path.name in images and not condemned):
            found.append(one)
    return sorted(found, key=lambda one: (_published(one), one.path.name))


def _published(one: _Original) -> int:
    try:
        return (one.path / _RECORDS["images"]).stat().st_mtime_ns
    except OSError:
        return 0


def _is_whole(one: _Original) -> bool:
    """Whether it is there, with a record that can be believed."""
    try:
        if one.kind == "images":
            read_image(one.path)
        else:
            read_snapshot(one.path)
    except (ImageNotFound, BadRecord):
        return False
    return True


def _still_is(path: Path, inode: int) -> bool:
    """Whether the directory is still where it was: whatever is deleted is renamed first."""
    try:
        return path.stat().st_ino == inode
    except FileNotFoundError:
        return False
