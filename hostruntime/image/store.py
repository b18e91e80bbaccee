"""The image store: immutable root trees, named, published whole and deleted when unused.

On disk, under ``images/``::

    img_01J…/                 a template's image
      tree/                   the root tree
      image.json              the manifest, readable JSON
      contents.json           its digest and packages, as the build's event said
      inodes                  what it holds, by inode (holdings.py)
      digest                  the digest of an image that was made without, once asked for
      users/<user>            an empty file for each sandbox or build that runs on it
      condemned               there once it has been deleted while in use
      kept                    there once it was put back from quarantine, until a row names it
    debian-12 -> debian-12@1732…   a base: a link to its current generation
    debian-12@1732…/          the same layout

A base can be made anew under its name while sandboxes run on the old one; the link is what
publishing replaces.  An image that is deleted while in use stays on disk, unseen, until its last
user has gone.  Everything is on disk, so it all holds when the agent starts again.

An image that nobody names, and one whose manifest cannot be believed, are not deleted but set aside
(:mod:`hostruntime.image.quarantine`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter

from hostruntime.errors import Conflict, HostError, ImageNotFound, InvalidRequest
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, write_atomically
from hostruntime.host.patience import scaled
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.image.digest import image_digest
from hostruntime.image.holdings import Holdings, reclaimable_bytes, write_holdings
from hostruntime.image.quarantine import Held, Quarantine
from hostruntime.image.trash import Trash
from hostruntime.image.trees import Check, Inventory, Measure, go_on, measure
from hostruntime.wire.images import ImageInfo

__all__ = ["Image", "ImageManifest", "ImageStore", "read_image"]

# Names that clients still use for an image that has another name now.
ALIASES: Mapping[str, str] = {"ubuntu-24.04": "debian-12"}
RECONCILE_AGE_SECONDS = scaled(600.0)
# So many are set aside in one pass without an operator's word.
RECONCILE_MOST = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_RECORD = "image.json"
_CONDEMNED, _KEPT = "condemned", "kept"
CONTENTS = "contents.json"
_DIGEST = "digest"
# To read the records of all images between two deletions of one.
_ATTEMPTS = 5
Directories = list[Path]
Ids = list[str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageManifest:
    """What is known of an image.  Sizes are bytes of disk; ``created_at`` is Unix seconds.

    ``shared_bytes`` is the part of ``size_bytes`` that was hard-linked from ``base`` when the
    image was made.  ``definition`` identifies the recipe of a built-in base, ``digest`` what is in
    the tree (:mod:`hostruntime.image.digest`), ``env`` what its commands begin
    with (:mod:`hostruntime.image.environment`).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    id: str
    kind: Literal["base", "template"]
    base: str | None
    created_at: float
    size_bytes: int
    file_count: int
    shared_bytes: int
    definition: str | None = None
    digest: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The manifest as it is written to disk."""
        return asdict(self)

    def info(self) -> ImageInfo:
        """What clients are told of it."""
        return ImageInfo(**{item.name: getattr(self, item.name) for item in fields(ImageInfo)})


@dataclass(frozen=True)
class Image:
    """A published image; ``tree`` stays where it is for as long as the image has a user."""

    id: str
    tree: Path
    manifest: ImageManifest


_MANIFEST = TypeAdapter(ImageManifest)


class ImageRevokedError(HostError):
    """Whoever was to publish this image has been ended meanwhile: it must not appear any more."""

    code = "image_revoked"
    status = 409


class ImageStore:
    """The images of one installation.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths, trash: Trash | None = None) -> None:
        self._paths = paths
        self._lock = threading.RLock()
        self._digesting = threading.Lock()
        # What images give back, as long as there are exactly these directories.
        self._usage: tuple[frozenset[str], dict[str, Measure]] = frozenset(), {}
        self._revoked: set[str] = set()
        self._said: set[str] = set()
        self.trash = trash or Trash(paths)
        self.quarantine = Quarantine(paths, self.trash)

    # Reading ------------------------------------------------------------------------------

    def get(self, image_id: str) -> Image:
        """The image of that id or alias; raises ImageNotFound, also once it has been deleted.

        Raises BadRecord for one whose manifest cannot be believed.
        """
        directory = self._current(image_id)
        if directory is None:
            raise ImageNotFound(
                f"There is no image {image_id!r} on this host. It may have been deleted, or it "
                "is a built-in base that has not been built yet."
            )
        return read_image(directory)

    def exists(self, image_id: str) -> bool:
        """Whether :meth:`get` would find it."""
        return self._current(image_id) is not None

    def list(self) -> list[Image]:
        """Every image that can be booted, oldest first; one that is damaged is left out."""
        names = [entry.name for entry in self._paths.images.iterdir() if "@" not in entry.name]
        found = []
        for name in names:
            try:
                found.append(self.get(name))
            except ImageNotFound:
                continue  # Deleted while we look.
            except BadRecord as error:
                if name not in self._said:
                    self._said.add(name)
                    _log.error("image %s is left out: %s", name, error)
        return sorted(found, key=lambda image: image.manifest.created_at)

    def users(self, image_id: str) -> set[str]:
        """Who runs on the image, its retired generations and a deleted image included."""
        return {
            user.name
            for directory in self._generations(_resolve(image_id))
            for user in _users(directory)
        }

    def usage(self, image_id: str) -> Measure:
        """The image's sizes; its ``shared_bytes`` are shared with any other image there is now.

        ``size_bytes - shared_bytes`` is what deleting it frees.  Slow (it reads every inode) for
        an image that was made before records were kept, and for one whose base has gone while
        there are such.
        """
        for _ in range(_ATTEMPTS):
            image, names = self.get(image_id), self._directories()
            kept = self._usage
            if kept[0] != names:
                kept = self._usage = names, {}
            directory = image.tree.parent
            with contextlib.suppress(FileNotFoundError):  # Some image was deleted meanwhile.
                if directory.name not in kept[1]:
                    freed = self._freed_with(directory, names)
                    if freed is None:
                        break
                    size = image.manifest.size_bytes
                    found = Measure(size, image.manifest.file_count, size - freed)
                    kept[1][directory.name] = found
                return kept[1][directory.name]
        return measure(self.get(image_id).tree)

    def _freed_with(self, directory: Path, names: Collection[str]) -> int | None:
        holdings = Holdings.of(directory)
        if holdings is None:
            return None
        return reclaimable_bytes(holdings, [self._paths.images / name for name in names])

    def _directories(self) -> frozenset[str]:
        with os.scandir(self._paths.images) as scan:
            return frozenset(entry.name for entry in scan if not entry.is_symlink())

    def keep_holdings(self, staged: Path, below: Image | None, found: Inventory) -> None:
        """Write down what the image in ``staged`` was found to hold.  Raises OSError."""
        write_holdings(staged, below.tree.parent if below is not None else None, found)

    def digest(self, image: Image, check: Check = go_on) -> str:
        """The image's digest; that of one made without is computed the first time, and kept.

        It is then that of a tree without a base: which one it was made over is not known for sure
        any more.  Slow then.  The image must be in use.  Raises OSError, and what ``check`` does.
        """
        if image.manifest.digest is not None:
            return image.manifest.digest
        kept = image.tree.parent / _DIGEST
        with self._digesting:
            with contextlib.suppress(OSError):
                found = kept.read_text(errors="replace")
                if _SHA256.fullmatch(found):
                    return found
            digest = image_digest(image.tree, check=check)
            write_atomically(kept, digest.encode())
            return digest

    # Using --------------------------------------------------------------------------------

    def acquire(self, image_id: str, user: str) -> Image:
        """Keep the image's tree on disk until ``user`` releases it; idempotent.

        Raises ImageNotFound; InvalidRequest for a user that is no plain name.
        """
        check_name(user)
        with self._lock:
            image = self.get(image_id)
            users = image.tree.parent / "users"
            users.mkdir(mode=0o700, exist_ok=True)
            (users / user).touch(mode=0o600)
        return image

    def share(self, image_id: str, holder: str, user: str) -> Image:
        """As :meth:`acquire`, of the very tree that ``holder`` uses; it may have been deleted.

        Raises ImageNotFound when the holder uses none.
        """
        check_name(user)
        with self._lock:
            for directory in self._generations(_resolve(image_id)):
                if (directory / "users" / check_name(holder)).exists():
                    (directory / "users" / user).touch(mode=0o600)
                    return read_image(directory)
        raise ImageNotFound(f"{holder} does not use the image {image_id!r} any more.")

    def release(self, image_id: str, user: str) -> None:
        """End ``user``'s use; an image or generation nobody can boot any more is then removed."""
        check_name(user)
        with self._lock:
            for directory in self._generations(_resolve(image_id)):
                with contextlib.suppress(FileNotFoundError):
                    (directory / "users" / user).unlink()
                self._remove_if_unused(directory)

    def release_all(self, user: str) -> None:
        """:meth:`release` of whatever image ``user`` uses."""
        for mark in self._paths.images.glob(f"*/users/{check_name(user)}"):
            self.release(mark.parents[1].name.partition("@")[0], user)

    # Making and deleting ------------------------------------------------------------------

    def staging(self, image_id: str) -> Path:
        """An empty directory to make ``tree`` in, on the store's filesystem."""
        directory = self.staging_path(image_id)
        self.trash.discard(directory)
        directory.mkdir(mode=0o700)
        return directory

    def staging_path(self, image_id: str) -> Path:
        """Where :meth:`staging` puts the directory of that id."""
        check_name(image_id)
        return self._paths.staging / image_id

    def flush(self) -> None:
        """Write to disk what has been staged, without publishing it.  Raises OSError."""
        kernel.syncfs(self._paths.staging)

    def publish(self, staged: Path, manifest: ImageManifest, *, flushed: bool = False) -> Image:
        """Make the image in ``staged`` (a directory with ``tree``) visible, whole, by one rename.

        A base replaces the generation there was.  ``flushed`` says that :meth:`flush` has been
        called on the tree.  Raises Conflict if a template image of that id exists;
        ImageRevokedError after :meth:`revoke`; OSError.  On any failure ``staged`` is still there.
        """
        check_name(manifest.id)
        write_atomically(
            staged / _RECORD, json.dumps(manifest.to_json(), indent=1).encode() + b"\n"
        )
        if flushed:
            kernel.fsync(staged / _RECORD)
            kernel.fsync(staged)
        else:
            self.flush()
        with self._lock:
            if manifest.id in self._revoked:
                raise ImageRevokedError(f"The build of {manifest.id} has been ended.")
            if manifest.kind == "base":
                directory = self._publish_base(staged, manifest.id)
            else:
                directory = self._publish_template(staged, manifest.id)
            kernel.fsync(self._paths.images)
        return read_image(directory)

    def revoke(self, image_id: str) -> bool:
        """From now on nothing is published under this id; False if something already has been.

        Decided under the lock of the rename that publishes: there is no third outcome.
        """
        with self._lock:
            if self.exists(image_id):
                return False
            self._revoked.add(image_id)
            return True

    def reinstate(self, image_id: str) -> None:
        """Forget a :meth:`revoke`: nobody is left who could publish."""
        with self._lock:
            self._revoked.discard(image_id)

    def _publish_template(self, staged: Path, image_id: str) -> Path:
        directory = self._paths.images / image_id
        if os.path.lexists(directory):
            raise Conflict(f"There is an image {image_id} already; ids are never used twice.")
        staged.rename(directory)
        return directory

    def _publish_base(self, staged: Path, name: str) -> Path:
        directory = self._paths.images / f"{name}@{time.time_ns()}"
        retired = self._generations(name)
        staged.rename(directory)
        link = self._paths.images / name
        temporary = self._paths.images / f".{name}@link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(directory.name)
        temporary.rename(link)
        for old in retired:
            self._remove_if_unused(old)
        return directory

    def delete(self, image_id: str) -> bool:
        """Delete an image: at once it is not found any more, on disk it waits for its users.

        Returns whether it is gone from disk's names already (or was never there).
        """
        with self._lock:
            directory = self._current(image_id)
            if directory is not None:
                link = self._paths.images / _resolve(image_id)
                if link.is_symlink():
                    link.unlink()
                else:
                    (directory / _CONDEMNED).touch(mode=0o600)
                self._remove_if_unused(directory)
            return not self._generations(_resolve(image_id))

    def reconcile(
        self,
        keep: Collection[str],
        most: int = RECONCILE_MOST,
        older_than: float = RECONCILE_AGE_SECONDS,
    ) -> tuple[Ids, Ids]:
        """Set aside template images not in ``keep`` and older than that many seconds.

        At most ``most`` of them, and none that is in use.  Returns those, and those that wait.
        Raises OSError.
        """
        cutoff = time.time() - older_than
        images = [image for image in self.list() if image.manifest.kind == "template"]
        surplus = []
        for image in images:
            mark = image.tree.parent / _KEPT
            if image.id in keep:
                mark.unlink(missing_ok=True)
            elif image.manifest.created_at < cutoff and not mark.exists():
                surplus.append(image)
        idle = [image for image in surplus if not self.users(image.id)]
        for image in idle[:most]:
            self._set_aside_unknown(image)
        return [image.id for image in idle[:most]], [image.id for image in idle[most:]]

    def _set_aside_unknown(self, image: Image) -> None:
        with self._lock:
            directory = image.tree.parent
            if self._current(image.id) == directory and not self.users(image.id):
                detail = "no template of the database names this image"
                size = image.manifest.size_bytes
                self.quarantine.add(directory, "image", "unknown", detail, size)

    def set_aside_damaged(self) -> None:
        """Set aside every image whose manifest cannot be believed.  Raises OSError."""
        with self._lock:
            for entry in list(self._paths.images.iterdir()):
                if entry.is_symlink() or entry.name.startswith("."):
                    continue
                try:
                    read_image(entry)
                except ImageNotFound:
                    self.quarantine.add_damaged(entry, "image", f"{entry} has no manifest")
                except BadRecord as error:
                    self.quarantine.add_damaged(entry, "image", error.detail)

    def restore(self, held: Held) -> Image:
        """Put an image back that was set aside: it stays, whether or not a row names it.

        Raises Conflict (there is another one, or its manifest is still bad), OSError.
        """
        content = self.quarantine.content(held)
        if "@" in held.name:
            raise Conflict("A built-in base is made anew when the console starts; start it again.")
        with self._lock:
            target = self._paths.images / held.name
            if os.path.lexists(target):
                raise Conflict(f"There is an image {held.name} already.")
            try:
                read_image(content, held.name)
            except (ImageNotFound, BadRecord) as error:
                raise Conflict(f"The image is still damaged. {error.detail}") from error
            (content / _KEPT).touch(mode=0o600)
            content.rename(target)
            kernel.fsync(self._paths.images)
        self.quarantine.forget(held)
        return read_image(target)

    def recover(self, live_users: Collection[str]) -> None:
        """The pass at start: forget users that are gone, drop half-made and unused trees."""
        self.quarantine.recover()
        self.set_aside_damaged()
        with self._lock:
            for entry in list(self._paths.images.iterdir()):
                if entry.is_symlink():
                    continue
                for user in _users(entry):
                    if user.name not in live_users:
                        user.unlink()
                self._remove_if_unused(entry)
            for staged in list(self._paths.staging.iterdir()):
                self.trash.discard(staged)
        self.trash.empty()

    # Inside -------------------------------------------------------------------------------

    def _current(self, image_id: str) -> Path | None:
        name = _resolve(image_id)
        if _NAME.fullmatch(name) is None:
            return None
        entry = self._paths.images / name
        directory = entry.parent / entry.readlink() if entry.is_symlink() else entry
        there = os.path.lexists(directory / _RECORD)
        return directory if there and not (directory / _CONDEMNED).exists() else None

    def _generations(self, name: str) -> Directories:
        if _NAME.fullmatch(name) is None:
            return []
        plain = self._paths.images / name
        found = [plain] if plain.is_dir() and not plain.is_symlink() else []
        return [*found, *self._paths.images.glob(f"{name}@*")]

    def _remove_if_unused(self, directory: Path) -> None:
        if any(True for _ in _users(directory)):
            return
        name = directory.name.partition("@")[0]
        retired = "@" in directory.name and self._current(name) != directory
        if retired or (directory / _CONDEMNED).exists():
            self.trash.discard(directory)


def _resolve(image_id: str) -> str:
    return ALIASES.get(image_id, image_id)


def check_name(name: str) -> str:
    """Return what is fit to be a directory's name; raises InvalidRequest for what is not."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:100]!r} is not a valid id: use letters, digits, dot, dash and underscore."
        )
    return name


def _users(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from list((directory / "users").iterdir())


def read_image(directory: Path, name: str | None = None) -> Image:
    """The image in a directory, of that name or its own.  Raises ImageNotFound, BadRecord."""
    path, named = directory / _RECORD, (name or directory.name).partition("@")[0]
    manifest = read_record(path, _MANIFEST)
    if manifest is None:
        raise ImageNotFound(f"The image {named} has just been deleted.")
    if manifest.id != named:
        raise BadRecord(path, f"it is the manifest of {manifest.id[:100]!r}")
    if not (directory / "tree").is_dir():
        raise BadRecord(path, "its tree is gone")
    return Image(manifest.id, directory / "tree", manifest)
