"""The database in a backup: one custom-format archive of pg_dump(1), from one snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from hostruntime.host.run import run
from orkestr_console.runner.backup.errors import BackupError
from orkestr_console.runner.layout import Layout
from orkestr_console.runner.lock import exclusive_lock, lock_holder
from orkestr_console.runner.postgres import DISTRIBUTION, running_server

# How long pg_dump or pg_restore may be idle; the time they work doesn't count.
IDLE_SECONDS = 300
CONNECT_SECONDS = 30
# libpq's environment variables whose names differ from their parameters' (libpq-envars).
_VARIABLES = {
    "dbname": "PGDATABASE",
    "application_name": "PGAPPNAME",
    "connect_timeout": "PGCONNECT_TIMEOUT",
}
_READY_IMAGES = "SELECT image_id FROM templates_app_template WHERE status = 'ready'"
_READY_SNAPSHOTS = (
    "SELECT id FROM sandboxes_app_snapshot WHERE status = 'ready' AND deleted_at IS NULL"
)
_STORED_VOLUMES = "SELECT id FROM sandboxes_app_volume WHERE stored AND deleted_at IS NULL"
_MIGRATIONS = "SELECT app || '.' || name FROM django_migrations ORDER BY 1"
_INSTALLATION = "SELECT id FROM installation_installation"
_TABLES = """SELECT count(*) FROM pg_catalog.pg_tables
             WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"""


@dataclass(frozen=True)
class DumpContents:
    """A dump's contents: the ids of images, snapshots and volumes that its rows refer to.

    ``server`` is PostgreSQL's major version.
    """

    server: int
    installation: str
    migrations: list[str]
    images: list[str]
    snapshots: list[str]
    volumes: list[str]


@contextmanager
def database(layout: Layout) -> Iterator[str]:
    """The URL of the installation's database, which is started if the console is not running.

    Raises BackupError, StartError (the console is starting), PostgresError.
    """
    if layout.database_url is not None:
        yield layout.database_url
    elif lock_holder(layout) is not None:
        if not layout.cluster.is_ready():
            raise BackupError("the console's database does not answer just now; try again")
        yield layout.cluster.url
    elif not (layout.cluster.data / "PG_VERSION").exists():
        raise BackupError(
            f"there is no installation in {layout.var}: set ORKESTR_VAR (and DATABASE_URL) as for "
            "the console"
        )
    else:
        with exclusive_lock(layout), running_server(layout.cluster, layout.log / "postgres.log"):
            yield layout.cluster.url


def dump(url: str, target: Path) -> DumpContents:
    """Write the archive, and list what its rows refer to, from the same snapshot.

    Raises BackupError, CommandFailed, psycopg.Error.
    """
    with psycopg.connect(url, connect_timeout=CONNECT_SECONDS) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.read_only = True
        (snapshot,) = _column(connection, "SELECT pg_export_snapshot()")
        contents = DumpContents(
            server=connection.info.server_version // 10_000,
            installation="".join(_column(connection, _INSTALLATION)),
            migrations=_column(connection, _MIGRATIONS),
            images=_column(connection, _READY_IMAGES),
            snapshots=_column(connection, _READY_SNAPSHOTS),
            volumes=_column(connection, _STORED_VOLUMES),
        )
        program = _program("pg_dump", contents.server)
        options = ["--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot}"]
        run(
            [str(program), *options, f"--file={target}"],
            timeout=IDLE_SECONDS,
            env=environment(url),
        )
    return contents


def load(url: str, archive: Path, server: int) -> None:
    """Load an archive from a server of that version into a database, atomically.

    Existing objects of the same names are replaced. Raises BackupError, CommandFailed.
    """
    options = ["--clean", "--if-exists", "--no-owner", "--no-privileges", "--single-transaction"]
    run(
        [
            *(str(_program("pg_restore", server)), *options, "--exit-on-error"),
            *(f"--dbname={conninfo_to_dict(url)['dbname']}", str(archive)),
        ],
        timeout=IDLE_SECONDS,
        env=environment(url),
    )


def is_empty(url: str) -> bool:
    """Whether a database has no tables. Raises psycopg.Error."""
    with psycopg.connect(url, connect_timeout=CONNECT_SECONDS) as connection:
        row = connection.execute(_TABLES).fetchone()
        return row is None or row[0] == 0


def environment(url: str) -> Mapping[str, str]:
    """The connection as libpq's environment: a password must not be on a command line."""
    parameters = conninfo_to_dict(url)
    return {
        _VARIABLES.get(name, f"PG{name.replace('_', '').upper()}"): str(value)
        for name, value in parameters.items()
        if value is not None
    }


def _column(connection: psycopg.Connection, query: str) -> list[str]:
    return [str(row[0]) for row in connection.execute(query.encode()).fetchall()]


def _program(name: str, server: int) -> Path:
    """The program of that server version, or the next newer one. Raises BackupError."""
    found = {int(path.parents[1].name): path for path in DISTRIBUTION.glob(f"*/bin/{name}")}
    suitable = [version for version in found if version >= server]
    if not suitable:
        raise BackupError(
            f"the database is PostgreSQL {server}, whose {name} is not installed: "
            f"apt-get install postgresql-client-{server}"
        )
    return found[min(suitable)]
