"""The image store: named, immutable root trees, published atomically and deleted when unused.

On disk, under ``images/``::

    img_01J…/                 a template's image
      tree/                   the root tree
      image.json              the manifest, readable JSON
      contents.json           its digest and packages, as in the build's event
      inodes                  its inode record (inode_record.py)
      digest                  the digest of an image built without one, once requested
      users/<user>            an empty file for each sandbox or build that runs on it
      condemned               marks an image deleted while in use
      kept                    marks an image restored from quarantine, until a row names it
    debian-12 -> debian-12@1732…   a base: a link to its current generation
    debian-12@1732…/          the same layout

A base can be rebuilt under its name while sandboxes run on the old one; publishing replaces the
link. An image that is deleted while in use stays on disk, hidden, until its last user releases it.
All state is on disk, so it survives a restart of the agent.

An image that no row names, or whose manifest is invalid, is quarantined instead of deleted
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
from hostruntime.host.paths import StatePaths
from hostruntime.host.patience import scaled
from hostruntime.host.records import STRICT, BadRecord, read_record
from hostruntime.host.writing import write_atomically
from hostruntime.image.digest import image_digest
from hostruntime.image.inode_record import InodeRecord, reclaimable_bytes, write_inode_record
from hostruntime.image.quarantine import Quarantine, QuarantinedItem
from hostruntime.image.trash import Trash
from hostruntime.image.trees import Check, Inventory, TreeSize, measure, no_check
from hostruntime.wire.images import ImageInfo

__all__ = ["Image", "ImageManifest", "ImageStore", "read_image"]

# Former names of images that clients still use.
ALIASES: Mapping[str, str] = {"ubuntu-24.04": "debian-12"}
RECONCILE_AGE_SECONDS = scaled(600.0)
# At most this many are quarantined in one pass without an operator's consent.
RECONCILE_LIMIT = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_RECORD = "image.json"
_DELETED_MARKER, _RESTORED_MARKER = "condemned", "kept"
CONTENTS_FILE = "contents.json"
_DIGEST = "digest"
# Attempts at reading the records of all images without one being deleted meanwhile.
_ATTEMPTS = 5
Directories = list[Path]
Ids = list[str]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageManifest:
    """An image's metadata. Sizes are bytes of disk; ``created_at`` is Unix seconds.

    ``shared_bytes`` is the part of ``size_bytes`` that was hard-linked from ``base`` when the
    image was built. ``definition`` identifies the recipe of a built-in base, ``digest`` the content
    of the tree (:mod:`hostruntime.image.digest`), ``env`` is its commands' environment
    (:mod:`hostruntime.image.environment`).
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
        """Return the manifest as written to disk."""
        return asdict(self)

    def info(self) -> ImageInfo:
        """Return the part that clients see."""
        return ImageInfo(**{item.name: getattr(self, item.name) for item in fields(ImageInfo)})


@dataclass(frozen=True)
class Image:
    """A published image; ``tree`` stays in place as long as the image has a user."""

    id: str
    tree: Path
    manifest: ImageManifest


_MANIFEST = TypeAdapter(ImageManifest)


class ImageRevokedError(HostError):
    """The build of this image was stopped meanwhile, so the image must not be published."""

    code = "image_revoked"
    status = 409


class ImageStore:
    """The images of one installation.  Methods may be called from any thread."""

    def __init__(self, paths: StatePaths, trash: Trash | None = None) -> None:
        self._paths = paths
        self._lock = threading.RLock()
        self._digest_lock = threading.Lock()
        # Usage of images, valid as long as exactly these directories exist.
        self._usage: tuple[frozenset[str], dict[str, TreeSize]] = frozenset(), {}
        self._revoked: set[str] = set()
        self._reported: set[str] = set()
        self.trash = trash or Trash(paths)
        self.quarantine = Quarantine(paths, self.trash)

    # Reading ------------------------------------------------------------------------------

    def get(self, image_id: str) -> Image:
        """Return the image of that id or alias.

        Raises ImageNotFound, also once it has been deleted; BadRecord if its manifest is invalid.
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
        """Return every image that can be booted, oldest first; damaged ones are skipped."""
        names = [entry.name for entry in self._paths.images.iterdir() if "@" not in entry.name]
        found = []
        for name in names:
            try:
                found.append(self.get(name))
            except ImageNotFound:
                continue  # Deleted meanwhile.
            except BadRecord as error:
                if name not in self._reported:
                    self._reported.add(name)
                    _log.error("skipping image %s: %s", name, error)
        return sorted(found, key=lambda image: image.manifest.created_at)

    def users(self, image_id: str) -> set[str]:
        """Return the image's users, including those of retired generations and deleted images."""
        return {
            user.name
            for directory in self._generations(_resolve(image_id))
            for user in _users(directory)
        }

    def usage(self, image_id: str) -> TreeSize:
        """Return the image's sizes; ``shared_bytes`` are those shared with any current image.

        ``size_bytes - shared_bytes`` is what deleting it frees. Slow (it reads every inode) for an
        image built before inode records existed, and for one whose base was deleted while
        such images exist.
        """
        for _ in range(_ATTEMPTS):
            image, names = self.get(image_id), self._directories()
            cached = self._usage
            if cached[0] != names:
                cached = self._usage = names, {}
            directory = image.tree.parent
            with contextlib.suppress(FileNotFoundError):  # Some image was deleted meanwhile.
                if directory.name not in cached[1]:
                    freed = self._reclaimable(directory, names)
                    if freed is None:
                        break
                    size = image.manifest.size_bytes
                    found = TreeSize(size, image.manifest.file_count, size - freed)
                    cached[1][directory.name] = found
                return cached[1][directory.name]
        return measure(self.get(image_id).tree)

    def _reclaimable(self, directory: Path, names: Collection[str]) -> int | None:
        record = InodeRecord.read(directory)
        if record is None:
            return None
        return reclaimable_bytes(record, [self._paths.images / name for name in names])

    def _directories(self) -> frozenset[str]:
        with os.scandir(self._paths.images) as scan:
            return frozenset(entry.name for entry in scan if not entry.is_symlink())

    def record_inodes(self, staged: Path, below: Image | None, found: Inventory) -> None:
        """Record the inodes ``found`` in the image in ``staged``.  Raises OSError."""
        write_inode_record(staged, below.tree.parent if below is not None else None, found)

    def digest(self, image: Image, check: Check = no_check) -> str:
        """Return the image's digest; for an image built without one, compute and store it.

        That is slow, and the digest is that of a tree without a base, as the base it was built
        over is no longer known for sure. The image must be in use. Raises OSError, and whatever
        ``check`` raises.
        """
        if image.manifest.digest is not None:
            return image.manifest.digest
        cached = image.tree.parent / _DIGEST
        with self._digest_lock:
            with contextlib.suppress(OSError):
                found = cached.read_text(errors="replace")
                if _SHA256.fullmatch(found):
                    return found
            digest = image_digest(image.tree, check=check)
            write_atomically(cached, digest.encode())
            return digest

    # Using --------------------------------------------------------------------------------

    def acquire(self, image_id: str, user: str) -> Image:
        """Keep the image's tree on disk until ``user`` releases it; idempotent.

        Raises ImageNotFound; InvalidRequest if the user is not a valid name.
        """
        check_name(user)
        with self._lock:
            image = self.get(image_id)
            users = image.tree.parent / "users"
            users.mkdir(mode=0o700, exist_ok=True)
            (users / user).touch(mode=0o600)
        return image

    def share(self, image_id: str, holder: str, user: str) -> Image:
        """Like :meth:`acquire`, for the same tree that ``holder`` uses, even if it was deleted.

        Raises ImageNotFound if the holder uses none.
        """
        check_name(user)
        with self._lock:
            for directory in self._generations(_resolve(image_id)):
                if (directory / "users" / check_name(holder)).exists():
                    (directory / "users" / user).touch(mode=0o600)
                    return read_image(directory)
        raise ImageNotFound(f"{holder} does not use the image {image_id!r} any more.")

    def release(self, image_id: str, user: str) -> None:
        """End ``user``'s use; removes an unused image or generation that can't be booted."""
        check_name(user)
        with self._lock:
            for directory in self._generations(_resolve(image_id)):
                with contextlib.suppress(FileNotFoundError):
                    (directory / "users" / user).unlink()
                self._remove_if_unused(directory)

    def release_all(self, user: str) -> None:
        """:meth:`release` every image that ``user`` uses."""
        for marker in self._paths.images.glob(f"*/users/{check_name(user)}"):
            self.release(marker.parents[1].name.partition("@")[0], user)

    # Creating and deleting ----------------------------------------------------------------

    def create_staging(self, image_id: str) -> Path:
        """Create an empty directory to build ``tree`` in, on the store's file system."""
        directory = self.staging_path(image_id)
        self.trash.discard(directory)
        directory.mkdir(mode=0o700)
        return directory

    def staging_path(self, image_id: str) -> Path:
        """Return the directory that :meth:`create_staging` creates for that id."""
        check_name(image_id)
        return self._paths.staging / image_id

    def flush(self) -> None:
        """Flush everything staged to disk, without publishing it.  Raises OSError."""
        kernel.syncfs(self._paths.staging)

    def publish(self, staged: Path, manifest: ImageManifest, *, flushed: bool = False) -> Image:
        """Publish the image in ``staged`` (a directory with ``tree``) atomically, by one rename.

        A base replaces its previous generation. ``flushed`` means :meth:`flush` was called after
        the tree was written. Raises Conflict if a template image of that id exists;
        ImageRevokedError after :meth:`revoke`; OSError. On failure ``staged`` remains.
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
                raise ImageRevokedError(f"The build of {manifest.id} has been stopped.")
            if manifest.kind == "base":
                directory = self._publish_base(staged, manifest.id)
            else:
                directory = self._publish_template(staged, manifest.id)
            kernel.fsync(self._paths.images)
        return read_image(directory)

    def revoke(self, image_id: str) -> bool:
        """Refuse to publish this id from now on; False if it has been published already.

        Takes the lock of the rename that publishes, so there is no third outcome.
        """
        with self._lock:
            if self.exists(image_id):
                return False
            self._revoked.add(image_id)
            return True

    def clear_revocation(self, image_id: str) -> None:
        """Undo :meth:`revoke`, once nothing is left that could publish."""
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
        """Delete an image: it disappears immediately, but stays on disk until its users finish.

        Returns whether it has left the store's directory (or never existed).
        """
        with self._lock:
            directory = self._current(image_id)
            if directory is not None:
                link = self._paths.images / _resolve(image_id)
                if link.is_symlink():
                    link.unlink()
                else:
                    (directory / _DELETED_MARKER).touch(mode=0o600)
                self._remove_if_unused(directory)
            return not self._generations(_resolve(image_id))

    def reconcile(
        self,
        named: Collection[str],
        limit: int = RECONCILE_LIMIT,
        older_than: float = RECONCILE_AGE_SECONDS,
    ) -> tuple[Ids, Ids]:
        """Quarantine template images not in ``named`` and older than ``older_than`` seconds.

        At most ``limit`` of them, and none in use. Returns those, and those left for later.
        Raises OSError.
        """
        cutoff = time.time() - older_than
        images = [image for image in self.list() if image.manifest.kind == "template"]
        unknown = []
        for image in images:
            marker = image.tree.parent / _RESTORED_MARKER
            if image.id in named:
                marker.unlink(missing_ok=True)
            elif image.manifest.created_at < cutoff and not marker.exists():
                unknown.append(image)
        idle = [image for image in unknown if not self.users(image.id)]
        for image in idle[:limit]:
            self._quarantine_unknown(image)
        return [image.id for image in idle[:limit]], [image.id for image in idle[limit:]]

    def _quarantine_unknown(self, image: Image) -> None:
        with self._lock:
            directory = image.tree.parent
            if self._current(image.id) == directory and not self.users(image.id):
                detail = "no template of the database names this image"
                size = image.manifest.size_bytes
                self.quarantine.add(directory, "image", "unknown", detail, size)

    def quarantine_damaged(self) -> None:
        """Quarantine every image whose manifest is invalid.  Raises OSError."""
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

    def restore(self, item: QuarantinedItem) -> Image:
        """Restore an image from quarantine; it then stays, even if no row names it.

        Raises Conflict (another one exists, or its manifest is still invalid), OSError.
        """
        content = self.quarantine.content_path(item)
        if "@" in item.name:
            raise Conflict("Built-in bases are rebuilt when the console starts; restart it.")
        with self._lock:
            target = self._paths.images / item.name
            if os.path.lexists(target):
                raise Conflict(f"There is an image {item.name} already.")
            try:
                read_image(content, item.name)
            except (ImageNotFound, BadRecord) as error:
                raise Conflict(f"The image is still damaged. {error.detail}") from error
            (content / _RESTORED_MARKER).touch(mode=0o600)
            content.rename(target)
            kernel.fsync(self._paths.images)
        self.quarantine.remove_entry(item)
        return read_image(target)

    def recover(self, live_users: Collection[str]) -> None:
        """Remove dead users, and partial and unused trees; called at start."""
        self.quarantine.recover()
        self.quarantine_damaged()
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
        exists = os.path.lexists(directory / _RECORD)
        return directory if exists and not (directory / _DELETED_MARKER).exists() else None

    def _generations(self, name: str) -> Directories:
        if _NAME.fullmatch(name) is None:
            return []
        plain = self._paths.images / name
        found = [plain] if plain.is_dir() and not plain.is_symlink() else []
        with contextlib.suppress(FileNotFoundError):
            # Not Path.glob, which takes ten times as long over each image.
            names = os.listdir(self._paths.images)  # noqa: PTH208
            found += [plain.with_name(each) for each in names if each.startswith(f"{name}@")]
        return found

    def _remove_if_unused(self, directory: Path) -> None:
        if _has_users(directory):
            return
        name = directory.name.partition("@")[0]
        retired = "@" in directory.name and self._current(name) != directory
        if retired or (directory / _DELETED_MARKER).exists():
            self.trash.discard(directory)


def _resolve(image_id: str) -> str:
    return ALIASES.get(image_id, image_id)


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid directory name; raises InvalidRequest otherwise."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{name[:100]!r} is not a valid id: use letters, digits, dot, dash and underscore."
        )
    return name


def _has_users(directory: Path) -> bool:
    """Whether there are any, at the same cost however many."""
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        os.scandir(directory / "users") as users,
    ):
        return next(users, None) is not None
    return False


def _users(directory: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        yield from list((directory / "users").iterdir())


def read_image(directory: Path, name: str | None = None) -> Image:
    """Read the image in a directory, which must have that name, or the directory's.

    Raises ImageNotFound, BadRecord.
    """
    path, named = directory / _RECORD, (name or directory.name).partition("@")[0]
    manifest = read_record(path, _MANIFEST)
    if manifest is None:
        raise ImageNotFound(f"The image {named} has just been deleted.")
    if manifest.id != named:
        raise BadRecord(path, f"it is the manifest of {manifest.id[:100]!r}")
    if not (directory / "tree").is_dir():
        raise BadRecord(path, "its tree is missing")
    return Image(manifest.id, directory / "tree", manifest)
