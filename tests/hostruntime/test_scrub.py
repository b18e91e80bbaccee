"""Scrubbing: what goes, what stays, and that no link or shared file is written through."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from hostruntime.scrub import remove_residue, scrub
from hostruntime.trees import tree_digest
from tests.hostruntime.trees_help import grow, shape

CORE = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x04\0" + b"\0" * 64
PROGRAM = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x03\0" + b"\0" * 64


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return grow(tmp_path / "tree", {"etc/hostname": "h"})


def files(tree: Path) -> set[str]:
    return {name for name, what in shape(tree).items() if what != "/"}


@pytest.mark.parametrize(
    "name",
    [
        "var/lib/apt/lists/mirror_dists_Packages",
        "var/lib/apt/lists/partial/half",
        "var/cache/apt/archives/jq_1.deb",
        "var/cache/apt/pkgcache.bin",
        "var/cache/ldconfig/aux-cache",
        "var/cache/man/index.db",
        "var/cache/debconf/config.dat-old",
        "var/log/apt/history.log",
        "var/log/dpkg.log",
        "var/log/syslog.1",
        "var/log/old.gz",
        "var/tmp/scratch/deep/file",
        "tmp/t",
        "root/.cache/pip/http/x",
        "root/.cache/uv/archive/x",
        "home/ann/.cache/pip/x",
        "home/ann/.cache/yarn/x",
        "root/.npm/_cacache/index",
        "root/.npm/_logs/log",
        "root/.yarn/berry/cache/x.zip",
        "usr/local/share/.cache/yarn/v6/x",
        "root/.bash_history",
        "home/ann/.python_history",
        "root/.wget-hsts",
        "etc/ssh/ssh_host_ed25519_key",
        "etc/ssh/ssh_host_ed25519_key.pub",
        "var/lib/dbus/machine-id",
        "var/lib/systemd/random-seed",
        "var/backups/dpkg.status.0",
        "run/daemon.pid",
        "run/nginx/nginx.pid",
    ],
)
def test_it_goes(tree: Path, name: str) -> None:
    grow(tree, {name: "x" * 5000})
    assert sum(gone.size_bytes for gone in scrub(tree).values()) >= 5000
    assert files(tree) == {"etc/hostname"}


@pytest.mark.parametrize(
    "name",
    [
        "root/.cache/huggingface/model.bin",
        "root/.cache/ms-playwright/chromium",
        "root/.npmrc",
        "root/.bashrc",
        "root/.config/pip/pip.conf",
        "usr/lib/python3/dist-packages/pip/__init__.py",
        "usr/local/lib/python3.12/__pycache__/os.cpython-312.pyc",
        "var/cache/debconf/config.dat",
        "var/cache/fontconfig/x.cache-7",
        "var/lib/dpkg/status",
        "etc/ssh/sshd_config",
        "run/lock/keep",
        "root/core",
        "core/notes",
        "home/ann/logs/access.log",
    ],
)
def test_it_stays(tree: Path, name: str) -> None:
    grow(tree, {name: "x"})
    scrub(tree)
    assert files(tree) == {"etc/hostname", name}


def test_a_core_file_is_told_by_its_content(tree: Path) -> None:
    grow(tree, {"root/": None})
    (tree / "core").write_bytes(CORE)
    (tree / "root/core.1234").write_bytes(CORE)
    (tree / "root/core.program").write_bytes(PROGRAM)
    scrub(tree)
    assert files(tree) == {"etc/hostname", "root/core.program"}


def test_logs_are_emptied_with_their_owner_and_mode(tree: Path) -> None:
    log = grow(tree / "var/log", {"nginx/access.log": "lines"}) / "nginx/access.log"
    os.chown(log, 33, 4)
    log.chmod(0o640)
    old = log.stat().st_ino
    scrub(tree)
    found = log.stat()
    assert (found.st_size, found.st_uid, found.st_gid) == (0, 33, 4)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert found.st_ino != old
    assert list(log.parent.iterdir()) == [log]


@pytest.mark.parametrize("kind", ["file", "symlink", "directory"])
def test_the_machine_id_is_blank_whatever_it_was(tree: Path, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("host")
    target = tree / "etc/machine-id"
    if kind == "file":
        target.write_text("0123456789abcdef")
    elif kind == "symlink":
        target.symlink_to(outside)
    else:
        grow(target, {"x": "x"})
    scrub(tree)
    assert stat.S_ISREG(target.lstat().st_mode)
    assert target.read_text() == ""
    assert outside.read_text() == "host"


def test_a_file_shared_with_the_base_is_never_written(tree: Path, tmp_path: Path) -> None:
    names = {
        "etc/machine-id": "0123",
        "var/log/syslog": "log",
        "var/cache/apt/pkgcache.bin": "cache",
        "root/.bash_history": "rm -rf",
    }
    base = grow(tmp_path / "base", names)
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(base / name, tree / name)
    before = tree_digest(base)
    freed = scrub(tree)
    assert tree_digest(base) == before
    assert files(tree) == {"etc/hostname", "etc/machine-id", "var/log/syslog"}
    # What is linked elsewhere gives nothing back, but it went.
    assert {what: (gone.size_bytes, gone.files) for what, gone in freed.items()} == {
        "apt caches": (0, 1),
        "logs": (0, 1),
        "shell and program history": (0, 1),
        "machine ids": (0, 1),
    }


def test_what_went_is_told_by_kind(tree: Path) -> None:
    grow(
        tree,
        {
            "var/lib/apt/lists/a": "x" * 5000,
            "var/lib/apt/lists/partial/b": "x",
            "root/.cache/pip/http/x": "x",
            "home/ann/.cache/pip/x": "x",
            "var/log/": None,
        },
    )
    assert {what: gone.files for what, gone in scrub(tree).items()} == {
        "apt package lists": 2,
        "pip cache": 2,
    }
    assert scrub(tree) == {}


def test_a_scrub_can_be_ended(tree: Path) -> None:
    grow(tree, {f"tmp/{number}": "x" for number in range(10)})
    calls = iter(range(5))

    def check() -> None:
        if next(calls, None) is None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        scrub(tree, check=check)
    assert 0 < len(list((tree / "tmp").iterdir())) < 10


@pytest.mark.parametrize(
    "link",
    [
        "var",
        "var/log",
        "var/log/apt",
        "var/lib/apt",
        "var/lib/apt/lists",
        "var/cache",
        "var/tmp",
        "tmp",
        "root",
        "root/.cache",
        "root/.cache/pip",
        "home/ann",
        "home",
        "etc/ssh",
        "run",
    ],
)
def test_a_symlinked_directory_leads_nowhere(tree: Path, tmp_path: Path, link: str) -> None:
    everything = {
        "log/syslog": "log",
        "apt/history.log": "log",
        "lists/x": "x",
        "x": "x",
        "pip/x": "x",
        ".cache/pip/x": "x",
        ".bash_history": "x",
        "ann/.bash_history": "x",
        "ssh_host_rsa_key": "key",
        "d.pid": "1",
        "core": "x",
    }
    outside = grow(tmp_path / "outside", everything)
    before = tree_digest(outside)
    (tree / link).parent.mkdir(parents=True, exist_ok=True)
    (tree / link).symlink_to(outside)
    scrub(tree)
    assert tree_digest(outside) == before


def test_a_symlinked_entry_is_unlinked_not_followed(tree: Path, tmp_path: Path) -> None:
    outside = grow(tmp_path / "outside", {"precious": "p"})
    grow(tree, {"var/lib/apt/lists/": None, "var/log/": None, "tmp/": None, "root/.cache/": None})
    (tree / "var/lib/apt/lists/link").symlink_to(outside)
    (tree / "tmp/link").symlink_to(outside)
    (tree / "root/.cache/pip").symlink_to(outside)
    (tree / "var/log/link.log").symlink_to(outside / "precious")
    scrub(tree)
    assert (outside / "precious").read_text() == "p"
    assert files(tree) == {"etc/hostname", "var/log/link.log"}


def test_pipes_and_odd_names_do_not_stop_it(tree: Path) -> None:
    grow(tree, {"var/log/": None, "tmp/": None})
    os.mkfifo(tree / "var/log/pipe")
    os.mkfifo(tree / "tmp/pipe")
    os.mkfifo(tree / "core")
    Path(os.fsdecode(os.fsencode(tree) + b"/tmp/\xff\n*")).write_text("odd")
    scrub(tree)
    assert list((tree / "tmp").iterdir()) == []
    assert stat.S_ISFIFO((tree / "var/log/pipe").stat().st_mode)


def test_what_the_runtime_lent_goes_back(tmp_path: Path) -> None:
    lent = {"etc/resolv.conf": "nameserver", "etc/apt/80proxy": "proxy", "etc/hosts": "lent"}
    runtime = grow(tmp_path / "runtime", {**lent, "etc/unchanged": "u"})
    base = grow(tmp_path / "base", {"etc/hosts": "the base's", "etc/unchanged": "u"})
    tree = grow(tmp_path / "tree", {**lent, "etc/own": "own"})
    os.link(base / "etc/unchanged", tree / "etc/unchanged")
    (tree / "etc/resolv.conf").write_text("a person's own")
    assert remove_residue(tree, base, runtime) == 2
    assert shape(tree) == {
        "etc": "/",
        "etc/apt": "/",
        "etc/hosts": "the base's",
        "etc/unchanged": "u",
        "etc/own": "own",
        "etc/resolv.conf": "a person's own",
    }
    assert (tree / "etc/hosts").stat().st_ino == (base / "etc/hosts").stat().st_ino


def test_residue_is_not_looked_for_behind_symlinks(tmp_path: Path) -> None:
    runtime = grow(tmp_path / "runtime", {"etc/hosts": "lent"})
    outside = grow(tmp_path / "outside", {"hosts": "lent"})
    tree = grow(tmp_path / "tree", {})
    (tree / "etc").symlink_to(outside)
    assert remove_residue(tree, grow(tmp_path / "base", {}), runtime) == 0
    assert (outside / "hosts").exists()
