"""One backup in its directory: its manifest and the checksums of its files.

::

    DIRECTORY/images/, snapshots/            what all backups here share (hostruntime.backup.vault)
    DIRECTORY/2026-11-29T22.05.00Z/          one backup, there once it is whole
        database.dump                        pg_dump's custom format
        keys/                                secret_key, token_pepper, console.json
        state/egress-allowlist.txt           the operator's additions, if there are any
        volumes/<id>.ext4                    each volume (hostruntime.backup.volumes)
        manifest.json                        which images and snapshots belong to it
        SHA256SUMS                           of the files above, as sha256sum(1) writes them
    DIRECTORY/.new/                          one being made; never counts
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from hostruntime.backup.vault import Stored
from hostruntime.backup.volumes import VOLUMES, StoredVolume
from hostruntime.host.paths import write_json
from hostruntime.host.records import STRICT, BadRecord, read_record
from orkestr_console.runner.backup.errors import BackupError

DUMP, KEYS, STATE = "database.dump", "keys", "state"
STAGING = ".new"
VERSION = 1
_MANIFEST, _SUMS = "manifest.json", "SHA256SUMS"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d\.\d\d\.\d\dZ(?:-\d+)?", re.ASCII)


@dataclass(frozen=True)
class Manifest:
    """A backup's contents. ``made_at`` is Unix seconds, ``server`` PostgreSQL's major version.

    ``lost`` lists what the database refers to but the disk no longer has.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    version: int
    made_at: float
    installation: str
    server: int
    migrations: list[str]
    stored: list[Stored]
    lost: list[str]
    # Earlier versions had none.
    volumes: list[StoredVolume] = field(default_factory=list)


_KIND = TypeAdapter(Manifest)


def backups(directory: Path) -> list[Path]:
    """Every complete backup in a directory, oldest first."""
    return sorted(entry for entry in directory.iterdir() if _NAME.fullmatch(entry.name))


def write(staged: Path, manifest: Manifest) -> None:
    """Write the manifest and checksums of a staged backup. Raises OSError."""
    write_json(staged / _MANIFEST, asdict(manifest))
    lines = [f"{_sha256(staged / name)}  {name}\n" for name in _files(staged)]
    (staged / _SUMS).write_text("".join(lines))


def read(backup: Path) -> Manifest:
    """The manifest of a backup whose own files are intact. Raises BackupError, OSError."""
    damaged = damaged_files(backup)
    if damaged:
        raise BackupError(f"the backup is damaged: {'; '.join(damaged)}")
    try:
        stored_manifest = read_record(backup / _MANIFEST, _KIND)
    except BadRecord as error:
        raise BackupError(error.detail) from error
    if stored_manifest is None or stored_manifest.version != VERSION:
        raise BackupError(f"{backup} was made by another version of the console; use that one")
    return stored_manifest


def read_installation(backup: Path) -> str:
    """The id of a backup's installation; blank if unreadable."""
    with suppress(BadRecord, OSError):
        found = read_record(backup / _MANIFEST, _KIND)
        return found.installation if found is not None else ""
    return ""


def damaged_files(backup: Path) -> list[str]:
    """The damaged ones among a backup's own files, with the reason."""
    try:
        lines = (backup / _SUMS).read_text(errors="replace").splitlines()
    except OSError as error:
        return [f"{backup.name}/{_SUMS}: {error.strerror}"]
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = [
        f"{backup.name}/{name}: {fault}"
        for name, digest in sums.items()
        if (fault := _checksum_problem(backup / name, digest))
    ]
    needed = {DUMP, _MANIFEST, f"{KEYS}/secret_key", f"{KEYS}/token_pepper"}
    return wrong + [f"{backup.name}/{name}: it has no sum" for name in needed - sums.keys()]


def _checksum_problem(path: Path, digest: str) -> str:
    try:
        return "" if _sha256(path) == digest else "it is not what was put there"
    except OSError as error:
        return error.strerror or "it cannot be read"


def _files(staged: Path) -> list[str]:
    """The files with a checksum here; a volume, mostly holes, has its own in the manifest."""
    files = (path.relative_to(staged) for path in staged.rglob("*") if path.is_file())
    return sorted(str(path) for path in files if path.name != _SUMS and path.parts[0] != VOLUMES)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(directory: Path, *, exclusive: bool) -> Iterator[None]:
    """Lock the backup directory (flock(2)), shared or exclusive.

    Raises BackupError, OSError.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BackupError(
            f"a backup into {directory}, or a restore from it, runs already; wait for it"
        ) from None
    finally:
        os.close(descriptor)
