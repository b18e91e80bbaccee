"""The private database cluster."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from orkestr_console.runner.account import ensure_user
from orkestr_console.runner.postgres import Cluster, PostgresError, temporary_cluster
from tests.stack import wait_for


@pytest.fixture
def directory() -> Iterator[Path]:
    """Under a closed directory, as a clone in /root is."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        yield Path(name) / "pg"


def test_a_cluster_serves_its_database_and_leaves_nothing(directory: Path) -> None:
    with temporary_cluster(directory) as cluster:
        url = cluster.url.replace("postgres://", "postgresql://")
        with psycopg.connect(url) as connection:
            found = connection.execute("SELECT current_user, inet_server_addr()").fetchone()
        assert found == ("orkestr", None)
        assert not cluster.create(), "it is there already"
        cluster.ensure_database()
    assert not directory.exists()


def test_a_cluster_of_a_version_that_is_gone_says_what_to_install(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, tmp_path)
    (tmp_path / "PG_VERSION").write_text("9\n")
    with pytest.raises(PostgresError, match="apt-get install postgresql-9"):
        cluster.command()


def test_a_socket_path_too_long_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "data", tmp_path / ("x" * 100))
    with pytest.raises(PostgresError, match="ORKESTR_VAR"):
        cluster.create()
    assert list(tmp_path.iterdir()) == []


def test_a_server_whose_parent_was_killed_at_once_is_ended(directory: Path) -> None:
    """It has not said yet that it wants to end with its parent (prctl(2))."""
    cluster = Cluster(directory / "data", directory / "sockets")
    directory.mkdir()
    ensure_user()
    cluster.create()
    cluster.stop_orphan()
    server = subprocess.Popen(cluster.command(), stderr=subprocess.DEVNULL)
    wait_for(cluster.is_ready, 60)
    cluster.stop_orphan()
    assert server.wait(60) == 0
    # The number in the file may be somebody else's by now.
    (cluster.data / "postmaster.pid").write_text(f"{os.getpid()}\n")
    cluster.stop_orphan()
