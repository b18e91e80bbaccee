"""A private PostgreSQL cluster: created once, on a Unix socket only, with peer authentication.

``python -m orkestr_console.runner.postgres exec DIRECTORY -- command…`` runs a command against a
temporary cluster in DIRECTORY, with ``DATABASE_URL`` set, and removes it afterwards.
"""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg import sql

from hostruntime.host.patience import Patience, process_tree, scaled
from orkestr_console.runner.account import USER, change_owner, confined_command, ensure_user

SERVER_USER = "postgres"
DATABASE = "orkestr"
DISTRIBUTION = Path("/usr/lib/postgresql")
# sun_path of unix(7) is 108 bytes with its NUL; PostgreSQL adds "/.s.PGSQL.5432.lock".
MAX_SOCKET_DIRECTORY = 108 - 20
CONNECT_SECONDS = 10
IDLE_SECONDS = 30


class PostgresError(Exception):
    """The private cluster cannot be created or started; the message says what to do."""


@dataclass(frozen=True)
class Cluster:
    """A cluster's two directories: its data and its socket."""

    data: Path
    sockets: Path

    @property
    def url(self) -> str:
        """The ``DATABASE_URL`` of this cluster."""
        return f"postgres://{USER}@/{DATABASE}?host={quote(str(self.sockets))}"

    def create(self) -> bool:
        """Create the cluster if there is none; whether one was created. Needs root.

        The console's user must exist (:func:`ensure_user`).

        Raises ``PostgresError``.
        """
        self._prepare_sockets()
        if (self.data / "PG_VERSION").exists():
            return False
        staging = self.data.with_name(f"{self.data.name}.new")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, mode=0o700)
        change_owner(staging, SERVER_USER)
        self._initdb(staging)
        (staging / "pg_hba.conf").write_text("local all all peer map=orkestr\n")
        (staging / "pg_ident.conf").write_text(_ident_map())
        staging.rename(self.data)
        return True

    def _prepare_sockets(self) -> None:
        if len(os.fsencode(self.sockets)) > MAX_SOCKET_DIRECTORY:
            raise PostgresError(
                f"{self.sockets} is too long a path for a Unix socket: set ORKESTR_VAR shorter"
            )
        _require_server_user()
        self.sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Nobody else may connect at all, and so use up the server's connections.
        os.chown(self.sockets, pwd.getpwnam(SERVER_USER).pw_uid, grp.getgrnam(USER).gr_gid)
        self.sockets.chmod(0o710)

    def _initdb(self, directory: Path) -> None:
        initdb = [
            *(newest_server() / "initdb", "-D", directory, "-U", SERVER_USER),
            *("-A", "peer", "-E", "UTF8", "--locale=C.UTF-8", "--data-checksums", "-N"),
        ]
        argv = [*confined_command(SERVER_USER, [directory]), *map(str, initdb)]
        result = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if result.returncode != 0:
            raise PostgresError(f"initdb failed in {directory}: {result.stderr.strip()}")

    def command(self, **settings: str) -> list[str]:
        """The argv that runs the server in the foreground; it exits with its parent.

        ``settings`` are server parameters. Raises ``PostgresError`` if the cluster's version of
        PostgreSQL is not installed.
        """
        # Autovacuum and the rest keep their defaults; only external interfaces are set here.
        fixed = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.sockets),
            "cluster_name": "orkestr",
            "log_line_prefix": "%m [%p] %u ",
            # A failed statement and its row contain secrets: sessions, sandboxes' variables.
            # The logs of web and worker say what failed.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
        }
        options = [f"--{name}={value}" for name, value in (fixed | settings).items()]
        server = str(server_programs(self.data) / "postgres")
        # SIGINT is PostgreSQL's fast shutdown: it does not wait for clients to leave.
        prefix = confined_command(SERVER_USER, [self.data, self.sockets], stop_signal="INT")
        return [*prefix, server, "-D", str(self.data), *options]

    def is_ready(self) -> bool:
        """Whether the server accepts connections."""
        try:
            self._connect(SERVER_USER).close()
        except psycopg.OperationalError:
            return False
        return True

    def responds(self) -> bool:
        """Whether the server answers at all, even if only to refuse a connection."""
        try:
            self._connect(SERVER_USER).close()
        except psycopg.OperationalError as error:
            # The server's own message; libpq's messages about its silence have no severity.
            return "FATAL" in str(error)
        return True

    def stop_orphan(self) -> None:
        """Stop a server that survived its killed parent.

        The caller holds the installation's lock. Raises ``PostgresError`` if it doesn't stop.
        """
        pid = self._server_pid()
        if pid is None:
            return
        os.kill(pid, signal.SIGINT)
        patience = Patience(IDLE_SECONDS, lambda: process_tree(pid))
        while self._server_pid() is not None:
            if patience.exhausted():
                raise PostgresError(f"the server of {self.data}, process {pid}, does not stop")
            time.sleep(0.05)

    def _server_pid(self) -> int | None:
        """The process that serves this data now, from postmaster.pid."""
        with suppress(OSError, ValueError, IndexError):
            pid = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            if os.fsencode(self.data) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
        return None

    def ensure_database(self) -> None:
        """Create the console's role and database, if missing. The server must be ready."""
        with self._connect(SERVER_USER) as connection:
            names = {"role": sql.Identifier(USER), "name": sql.Identifier(DATABASE)}
            if not _exists(connection, "SELECT 1 FROM pg_roles WHERE rolname = %s", USER):
                statement = sql.SQL("CREATE ROLE {role} LOGIN CREATEDB")
                connection.execute(statement.format(**names))
            if not _exists(connection, "SELECT 1 FROM pg_database WHERE datname = %s", DATABASE):
                statement = sql.SQL("CREATE DATABASE {name} OWNER {role}")
                connection.execute(statement.format(**names))

    def _connect(self, user: str) -> psycopg.Connection:
        return psycopg.connect(
            host=str(self.sockets),
            user=user,
            dbname="postgres",
            autocommit=True,
            connect_timeout=round(scaled(CONNECT_SECONDS)),
        )


def _exists(connection: psycopg.Connection, query: str, name: str) -> bool:
    return connection.execute(query.encode(), [name]).fetchone() is not None


def _ident_map() -> str:
    """The mapping from system users to database roles (pg_ident.conf)."""
    pairs = [("root", USER), ("root", SERVER_USER), (USER, USER), (SERVER_USER, SERVER_USER)]
    return "".join(f"orkestr {system} {role}\n" for system, role in pairs)


def _require_server_user() -> None:
    try:
        pwd.getpwnam(SERVER_USER)
    except KeyError:
        raise PostgresError(
            "there is no 'postgres' user: install Debian's postgresql package (make run does)"
        ) from None


def newest_server() -> Path:
    """The program directory of the newest installed PostgreSQL server package."""
    servers = [path.parent for path in DISTRIBUTION.glob("*/bin/postgres")]
    if not servers:
        raise PostgresError("no PostgreSQL server is installed: apt-get install postgresql")
    return max(servers, key=lambda path: int(path.parent.name))


def server_programs(data: Path) -> Path:
    """The program directory of the version that created ``data``."""
    version = (data / "PG_VERSION").read_text().strip()
    programs = DISTRIBUTION / version / "bin"
    if not (programs / "postgres").exists():
        raise PostgresError(
            f"{data} was made by PostgreSQL {version}, which is not installed any more: "
            f"apt-get install postgresql-{version}, or move it over with pg_upgrade"
        )
    return programs


@contextmanager
def temporary_cluster(directory: Path) -> Iterator[Cluster]:
    """A running cluster in ``directory`` inside the block; removed afterwards.

    Durability is off: it is for tests. Raises ``PostgresError`` if it doesn't start.
    """
    ensure_user()
    directory.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(directory / "data", directory / "sockets")
    cluster.create()
    try:
        settings = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        with running_server(cluster, directory / "postgres.log", **settings):
            yield cluster
    finally:
        shutil.rmtree(directory)


@contextmanager
def running_server(cluster: Cluster, log: Path, **settings: str) -> Iterator[None]:
    """Run the cluster's server inside the block, and create its database.

    ``settings`` are server parameters. Raises ``PostgresError`` if it doesn't start.
    """
    cluster.stop_orphan()
    with log.open("ab") as output:
        server = subprocess.Popen(
            # From the start; dropping privileges clears it, and sets it again (prctl(2)).
            ["setpriv", "--pdeathsig=TERM", "--", *cluster.command(**settings)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_ready(cluster, server, log)
        cluster.ensure_database()
        yield
    finally:
        server.send_signal(signal.SIGINT)
        _wait_until_exited(server)


def _wait_until_ready(cluster: Cluster, server: subprocess.Popen[bytes], log: Path) -> None:
    patience = Patience(IDLE_SECONDS, lambda: process_tree(server.pid))
    while not cluster.is_ready():
        if server.poll() is not None or patience.exhausted():
            raise PostgresError(f"the database did not start: {log.read_text()[-2000:]}")
        time.sleep(0.05)


def _wait_until_exited(server: subprocess.Popen[bytes]) -> None:
    patience = Patience(IDLE_SECONDS, lambda: process_tree(server.pid))
    while server.poll() is None:
        if patience.exhausted():
            raise PostgresError(f"the database did not stop: it {patience.reason}")
        time.sleep(0.05)


def main(argv: Sequence[str]) -> int:
    """Run a command against a temporary cluster; returns its exit status."""
    parser = argparse.ArgumentParser(prog="postgres")
    parser.add_argument("verb", choices=["exec"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(argv)
    with temporary_cluster(options.directory.resolve()) as cluster:
        environment = {**os.environ, "DATABASE_URL": cluster.url}
        return subprocess.run(options.command, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
