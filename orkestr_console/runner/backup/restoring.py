"""`manage.py restore`: restore a backup into an empty installation.

Everything is verified against its digest first; then the file ``restoring`` in the var directory
marks the start, and the console does not start until the restore is complete.  A retry starts over.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from django.core.management import call_command
from django.db import connection, connections
from django.db.backends.postgresql.base import DatabaseWrapper
from django.db.migrations.loader import MigrationLoader

from hostruntime.backup import volumes
from hostruntime.backup.vault import Vault
from hostruntime.host.paths import StatePaths
from orkestr_console.installation.services import adopt_restored
from orkestr_console.runner.account import ensure_user
from orkestr_console.runner.backup import manifest
from orkestr_console.runner.backup.database import is_empty, load
from orkestr_console.runner.backup.errors import BackupError
from orkestr_console.runner.backup.manifest import Manifest
from orkestr_console.runner.backup.taking import SECRETS, Report
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import exclusive_lock
from orkestr_console.runner.postgres import running_server


def restore(
    layout: Layout, directory: Path, name: str | None, vault: Vault, report: Report
) -> Manifest:
    """Restore the backup of that name, or the newest; return its manifest.

    Raises BackupError, StartError (the console runs), PostgresError, HostError, OSError. Nothing
    uses an incomplete restore, and a retry replaces it.
    """
    backup = choose_backup(directory, name)
    with manifest.locked(directory, exclusive=False):
        layout.prepare()
        with exclusive_lock(layout):
            ensure_user()
            require_empty(layout)
            report(f"verifying {backup.name}")
            backup_manifest = verify_backup(backup, vault)
            layout.restore_marker.write_text(f"{backup}\n")
            report("images, snapshots and volumes")
            restore_state(layout, backup, backup_manifest, vault)
            report("database")
            restore_keys(layout, backup)
            restore_database(layout, backup, backup_manifest)
            # There are no containers: the next start records that in the database.
            layout.sandboxes_ended_marker.touch()
            os.sync()
            layout.restore_marker.unlink()
    return backup_manifest


def choose_backup(directory: Path, name: str | None) -> Path:
    """The backup to restore. Raises BackupError if there is none of that name."""
    candidates = manifest.backups(directory) if directory.is_dir() else []
    if name is not None:
        candidates = [backup for backup in candidates if backup.name == name]
    if not candidates:
        named = f" called {name}" if name is not None else ""
        raise BackupError(f"there is no whole backup{named} in {directory}")
    return candidates[-1]


def require_empty(layout: Layout) -> None:
    """Raise BackupError if there is anything that a restore would have to replace."""
    if layout.restore_marker.exists():
        return
    kinds = ("images", "snapshots", "volumes", "sandboxes", "disks", "quarantine")
    used = [path for kind in kinds for path in (layout.state_dir / kind).glob("*")]
    if used:
        reason = f"{used[0].parent} is not empty"
    elif layout.database_url is None and layout.cluster.data.exists():
        reason = f"there is a database in {layout.cluster.data}"
    elif layout.database_url is not None and not is_empty(layout.database_url):
        reason = "the database of DATABASE_URL has tables"
    else:
        return
    raise BackupError(
        f"this installation is not empty ({reason}), and a restore replaces nothing: restore into "
        "a new one, with ORKESTR_VAR=… and PORT=…, or say `make clean` first if nothing here is "
        "needed any more"
    )


def verify_backup(backup: Path, vault: Vault) -> Manifest:
    """The manifest of a complete backup for this console version. Raises BackupError."""
    backup_manifest = manifest.read(backup)
    damaged = vault.damaged(backup_manifest.stored)
    damaged += volumes.damaged(backup, backup_manifest.volumes, vault.check)
    if damaged:
        listed = "\n  ".join(damaged)
        raise BackupError(f"the backup is damaged, and nothing was restored:\n  {listed}")
    unknown = set(backup_manifest.migrations) - known_migrations()
    if unknown:
        raise BackupError(
            f"the backup was made by a newer version of the console (it knows {min(unknown)}): "
            "restore with that version"
        )
    for name, variable in SECRETS.items():
        named = os.environ.get(variable)
        if named and named != (backup / manifest.KEYS / name).read_text():
            raise BackupError(
                f"{variable} is set and is not the backup's: sign-ins or tokens would not hold. "
                "Leave it out, or set it to what it was"
            )
    return backup_manifest


def known_migrations() -> set[str]:
    """The migrations of this console version, named as in the database."""
    loader = MigrationLoader(None)
    replaced = (old for migration in loader.disk_migrations.values() for old in migration.replaces)
    return {f"{app}.{name}" for app, name in (*loader.disk_migrations, *replaced)}


def restore_state(layout: Layout, backup: Path, found: Manifest, vault: Vault) -> None:
    """Restore images, snapshots, volumes and the operator's allowlist. Raises OSError."""
    paths = StatePaths(layout.state_dir).ensure()
    for directory in (paths.images, paths.snapshots, paths.volumes):
        # What an earlier attempt left.
        shutil.rmtree(directory)
        directory.mkdir(mode=0o700)
    vault.restore(found.stored, paths)
    volumes.restore(backup, found.volumes, paths, vault.check)
    for path in (backup / manifest.STATE).glob("*"):
        shutil.copyfile(path, layout.state_dir / path.name)


def restore_keys(layout: Layout, backup: Path) -> None:
    """Put keys and credentials where the console looks for them. Raises OSError."""
    for path in (backup / manifest.KEYS).iterdir():
        target = layout.run / path.name
        target.unlink(missing_ok=True)
        target.touch(mode=0o600)
        shutil.copyfile(path, target)


def restore_database(layout: Layout, backup: Path, found: Manifest) -> None:
    """Create the database, and associate the restored state with it.

    Raises BackupError, PostgresError, CommandFailed, OSError.
    """
    if layout.database_url is not None:
        load_database(layout, layout.database_url, backup, found)
        return
    # What an earlier attempt left.
    layout.cluster.stop_orphan()
    shutil.rmtree(layout.cluster.data, ignore_errors=True)
    layout.cluster.create()
    with running_server(layout.cluster, layout.log / "postgres.log"):
        load_database(layout, layout.cluster.url, backup, found)


def load_database(layout: Layout, url: str, backup: Path, found: Manifest) -> None:
    """Load the archive, migrate the schema, and adopt the restored state."""
    load(url, backup / manifest.DUMP, found.server)
    try:
        call_command("migrate", interactive=False, verbosity=0)
        adopt_restored(StatePaths(layout.state_dir))
    finally:
        connection.close()
        if isinstance(pooled := connections["default"], DatabaseWrapper):
            pooled.close_pool()
