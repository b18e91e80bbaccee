"""`manage.py backup`: copy what is new, while the console keeps running."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hostruntime.backup import volumes
from hostruntime.backup.vault import Stored, Taken, Vault
from hostruntime.backup.volumes import StoredVolume
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths
from orkestr_console.runner.backup import manifest
from orkestr_console.runner.backup.database import DumpContents, database, dump
from orkestr_console.runner.backup.errors import BackupError
from orkestr_console.runner.layout import Layout

KEEP = 7
# Secret files of the run directory, and the environment variables that override them.
SECRETS = {"secret_key": "ORKESTR_SECRET_KEY", "token_pepper": "ORKESTR_TOKEN_PEPPER"}
ALLOWLIST = "egress-allowlist.txt"
Report = Callable[[str], None]


@dataclass(frozen=True)
class BackupSummary:
    """A complete backup. ``lost`` is what the database refers to but the disk no longer has."""

    name: str
    text: str
    lost: list[str]


def create_backup(
    layout: Layout, directory: Path, keep: int, vault: Vault, report: Report
) -> BackupSummary:
    """Create a backup in ``directory``, and delete all but the last ``keep``.

    Raises BackupError, StartError, PostgresError, HostError, psycopg.Error, OSError; then there is
    no new backup, and a retry reuses what was copied.
    """
    prepare(layout, directory)
    with manifest.locked(directory, exclusive=True):
        staged = directory / manifest.STAGING
        try:
            vault.prepare()
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(mode=0o700)
            report("database")
            with database(layout) as url:
                contents = dump(url, staged / manifest.DUMP)
            require_same_installation(directory, contents)
            copy_keys(layout, staged)
            report("images and snapshots")
            stored_files = vault.take(
                StatePaths(layout.state_dir), contents.images, contents.snapshots
            )
            report("volumes")
            taken_volumes = take_volumes(layout, directory, contents.volumes, vault)
            stored_files.lost += taken_volumes.lost
            name = publish(directory, staged, contents, stored_files, taken_volumes.stored)
            prune(directory, keep, vault)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            vault.clear_partial()
    count = len(taken_volumes.stored)
    text = (
        f"{count} volume{'' if count == 1 else 's'}, {len(stored_files.stored)} images and "
        f"snapshots, {len(stored_files.copied)} new"
    )
    return BackupSummary(name, text, stored_files.lost)


def take_volumes(
    layout: Layout, directory: Path, wanted: list[str], vault: Vault
) -> volumes.TakenVolumes:
    """Copy the volumes that are not as in the backup before. Raises HostError, OSError."""
    return volumes.take(
        StatePaths(layout.state_dir),
        layout.host_socket,
        wanted,
        directory / manifest.STAGING,
        earlier_volumes(directory),
        vault.check,
    )


def earlier_volumes(directory: Path) -> dict[StoredVolume, Path]:
    """The volumes of the backup before, by what they are. Raises OSError."""
    for backup in manifest.backups(directory)[-1:]:
        with suppress(BackupError):
            found = manifest.read(backup).volumes
            return {one: backup / volumes.VOLUMES / one.file for one in found}
    return {}


def prepare(layout: Layout, directory: Path) -> None:
    """Create the directory, accessible only to root. Raises BackupError for an unsuitable one."""
    for inside, what in ((layout.var, "ORKESTR_VAR"), (layout.state_dir, "ORKESTR_STATE_DIR")):
        if directory.resolve().is_relative_to(inside.resolve()):
            raise BackupError(
                f"{directory} is inside {what} ({inside}), and would go with what it is a backup "
                "of: use a directory on another disk"
            )
    if directory.exists() and not directory.is_dir():
        raise BackupError(f"{directory} is not a directory")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    unexpected = {path.name for path in directory.iterdir()} - {"lost+found", manifest.STAGING}
    if unexpected and not (directory / "images").is_dir():
        raise BackupError(
            f"{directory} holds something else ({min(unexpected)}): use a new or empty directory"
        )
    os.chown(directory, 0, 0)
    directory.chmod(0o700)


def require_same_installation(directory: Path, contents: DumpContents) -> None:
    """Require existing backups to be of the same installation. Raises BackupError."""
    # Blank for a console that has never served.
    owners = {manifest.read_installation(backup) for backup in manifest.backups(directory)} - {""}
    if owners - {contents.installation}:
        raise BackupError(
            f"{directory} holds backups of another installation: use a directory of its own"
        )


def copy_keys(layout: Layout, staged: Path) -> None:
    """Copy keys, credentials and the operator's allowlist. Raises BackupError, OSError."""
    keys = staged / manifest.KEYS
    keys.mkdir(mode=0o700)
    for name, variable in SECRETS.items():
        value = os.environ.get(variable) or secret_in(layout.run / name)
        (keys / name).write_text(value)
    if layout.console_json.exists():
        shutil.copyfile(layout.console_json, keys / layout.console_json.name)
    if (layout.state_dir / ALLOWLIST).exists():
        (staged / manifest.STATE).mkdir(mode=0o700)
        shutil.copyfile(layout.state_dir / ALLOWLIST, staged / manifest.STATE / ALLOWLIST)


def secret_in(path: Path) -> str:
    """The secret in a file of the run directory. Raises BackupError if it is missing."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        raise BackupError(
            f"there is no {path}: set ORKESTR_VAR, and the other variables, as for the console"
        ) from None


def publish(
    directory: Path,
    staged: Path,
    contents: DumpContents,
    stored_files: Taken,
    stored_volumes: list[StoredVolume],
) -> str:
    """Flush and publish the backup with one rename; its name. Raises OSError."""
    made_at = time.time()
    manifest.write(
        staged,
        manifest.Manifest(
            version=manifest.VERSION,
            made_at=made_at,
            installation=contents.installation,
            server=contents.server,
            migrations=contents.migrations,
            stored=stored_files.stored,
            lost=stored_files.lost,
            volumes=stored_volumes,
        ),
    )
    kernel.syncfs(staged)
    stamp = time.strftime("%Y-%m-%dT%H.%M.%SZ", time.gmtime(made_at))
    name, number = stamp, 1
    while (directory / name).exists():
        name, number = f"{stamp}-{number}", number + 1
    staged.rename(directory / name)
    kernel.syncfs(directory)
    return name


def prune(directory: Path, keep: int, vault: Vault) -> None:
    """Delete all but the last ``keep`` backups, and what only they refer to.

    No images are deleted while any remaining backup is unreadable. Raises OSError.
    """
    complete_backups = manifest.backups(directory)
    for old in complete_backups[:-keep]:
        staging = directory / manifest.STAGING
        old.rename(staging)
        shutil.rmtree(staging)
    retained = complete_backups[-keep:]
    if not any(map(manifest.damaged_files, retained)):
        vault.prune(
            {
                stored_file.path
                for backup in retained
                for stored_file in manifest.read(backup).stored
            }
        )


def verify(directory: Path, vault: Vault, report: Report) -> list[str]:
    """Read every backup in a directory; the damaged paths, with the reason.

    Raises BackupError if there is none, OSError.
    """
    if not directory.is_dir() or not (complete_backups := manifest.backups(directory)):
        raise BackupError(f"there is no whole backup in {directory}")
    with manifest.locked(directory, exclusive=False):
        damaged: list[str] = []
        stored: dict[str, Stored] = {}
        for backup in complete_backups:
            report(backup.name)
            problems = manifest.damaged_files(backup)
            damaged += problems
            if not problems:
                found = manifest.read(backup)
                stored |= {stored_file.path: stored_file for stored_file in found.stored}
                damaged += volumes.damaged(backup, found.volumes, vault.check)
        report("images and snapshots")
        return damaged + vault.damaged(stored.values())
