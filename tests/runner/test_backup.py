"""The commands `backup` and `restore`, on real databases and without a console that runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from hostruntime.host.paths import StatePaths
from hostruntime.image.store import ImageStore
from orkestr_console.runner.backup import manifest
from orkestr_console.runner.backup.database import environment
from orkestr_console.runner.postgres import Cluster, temporary_cluster
from tests.hostruntime.test_images import publish

TREE = Path(__file__).resolve().parents[2]


class Installation:
    """A var directory, and a database that somebody else runs."""

    def __init__(self, var: Path, cluster: Cluster, name: str) -> None:
        self.var, self.state = var, var / "host"
        self.url = cluster.url.replace("@/orkestr?", f"@/{name}?")
        with psycopg.connect(cluster.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())

    def manage(self, *words: str, status: int = 0, **more: str) -> str:
        names = {"ORKESTR_VAR": str(self.var), "DATABASE_URL": self.url, "PORT": "29999"}
        kept = {k: v for k, v in os.environ.items() if not k.startswith("ORKESTR_")}
        done = subprocess.run(
            [sys.executable, "manage.py", *words],
            cwd=TREE,
            env={**kept, **names, **more},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def rows(self, query: str) -> list[tuple[object, ...]]:
        with psycopg.connect(self.url) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def cluster(scratch: Path) -> Iterator[Cluster]:
    with temporary_cluster(scratch / "pg") as made:
        yield made


@pytest.fixture(scope="module")
def first(scratch: Path, cluster: Cluster) -> Installation:
    made = Installation(scratch / "first", cluster, "first")
    made.manage("migrate", "--verbosity=0")
    made.manage("shell", "-c", "from orkestr_console.installation.services import *; current()")
    publish(ImageStore(StatePaths(made.state).ensure()), "debian-12", kind="base")
    return made


@pytest.fixture(scope="module")
def place(scratch: Path, first: Installation) -> Path:
    """A directory with a backup in it."""
    first.manage("backup", str(scratch / "kept"))
    return scratch / "kept"


def test_another_servers_database_is_backed_up_and_restored(
    scratch: Path, cluster: Cluster, first: Installation, place: Path
) -> None:
    second = Installation(scratch / "second", cluster, "second")
    second.manage("restore", str(place))
    query = "SELECT id, confirmed, mismatch FROM installation_installation"
    assert [row[0] for row in first.rows(query)] == [row[0] for row in second.rows(query)]
    # The rows own the state that came with them.
    assert [row[1:] for row in second.rows(query)] == [(True, "")]
    (mark,) = second.rows("SELECT mark FROM installation_installation")[0]
    assert str(mark) in (second.state / "installation.json").read_text()
    for name in ("secret_key", "token_pepper"):
        path = second.var / "run" / name
        assert path.read_text() == (first.var / "run" / name).read_text()
        assert path.stat().st_mode & 0o777 == 0o600
    assert "the database of DATABASE_URL has tables" in again_without_state(second, place)


def again_without_state(second: Installation, place: Path) -> str:
    subprocess.run(["rm", "-r", second.state], check=True)
    return second.manage("restore", str(place), status=1)


def test_what_would_not_hold_is_refused_before_anything_changes(
    scratch: Path, cluster: Cluster, place: Path
) -> None:
    third = Installation(scratch / "third", cluster, "third")
    (backup,) = manifest.backups(place)
    said = third.manage("restore", str(place), status=1, ORKESTR_TOKEN_PEPPER="another")
    assert "ORKESTR_TOKEN_PEPPER is set and is not the backup's" in said
    found = manifest.read(backup)
    manifest.write(backup, replace(found, migrations=[*found.migrations, "accounts.9999_later"]))
    assert "newer version of the console" in third.manage("restore", str(place), status=1)
    manifest.write(backup, found)
    assert third.manage("restore", str(place), "--name=2001", status=1).count("called 2001") == 1
    assert not third.state.exists()
    assert not (third.var / "restoring").exists()
    third.manage("restore", str(place))


def test_a_directory_that_holds_something_else_is_left_alone(
    scratch: Path, cluster: Cluster, first: Installation, place: Path
) -> None:
    strange = scratch / "strange"
    strange.mkdir(mode=0o755)
    (strange / "letter").write_text("mine")
    assert "holds something else (letter)" in first.manage("backup", str(strange), status=1)
    assert strange.stat().st_mode & 0o777 == 0o755
    other = Installation(scratch / "other", cluster, "other")
    other.manage("migrate", "--verbosity=0")
    other.manage("shell", "-c", "from orkestr_console.installation.services import *; current()")
    StatePaths(other.state).ensure()
    assert "another installation" in other.manage("backup", str(place), status=1)
    assert len(manifest.backups(place)) == 1
    assert not (place / manifest.STAGING).exists()


def test_two_at_once_are_one_too_many(first: Installation, place: Path) -> None:
    with manifest.locked(place, exclusive=False):
        assert "runs already" in first.manage("backup", str(place), status=1)
        first.manage("backup", "--verify", str(place))
    with manifest.locked(place, exclusive=True):
        assert "runs already" in first.manage("backup", "--verify", str(place), status=1)


def test_a_password_is_on_no_command_line() -> None:
    url = "postgres://me:secret@db.example:5433/kept?sslmode=require&application_name=x"
    assert environment(url) == {
        "PGUSER": "me",
        "PGPASSWORD": "secret",
        "PGHOST": "db.example",
        "PGPORT": "5433",
        "PGDATABASE": "kept",
        "PGSSLMODE": "require",
        "PGAPPNAME": "x",
    }
