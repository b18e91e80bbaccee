"""Scrubbing: what goes, what stays, and that no link or shared file is written through."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from hostruntime.host import kernel
from hostruntime.image.scrub import remove_residue, scrub
from tests.hostruntime.trees_help import grow, shape
from tests.trees import tree_digest

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
        "var/cache/bind/managed-keys.bind",
        "var/cache/apt/archives/partial/half.deb",
        "var/cache/debconf/config.dat-old",
        "var/log/apt/history.log",
        "var/log/journal/0123/system.journal",
        "var/log/dpkg.log",
        "var/log/syslog.1",
        "var/log/old.gz",
        "var/tmp/scratch/deep/file",
        "tmp/t",
        "root/.cache/pip/http/x",
        "root/.cache/uv/archive/x",
        "root/.cache/pypoetry/cache/repositories/x",
        "root/.cache/pypoetry/artifacts/ab/x.whl",
        "root/.cache/pipenv/depcache.json",
        "root/.cache/pdm/http/x",
        "root/.cache/pdm/hashes.json",
        "root/.cache/pnpm/metadata-v1.3/x",
        "root/.cache/composer/files/x.zip",
        "root/.local/share/NuGet/http-cache/x",
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
        "var/backups/shadow.bak",
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
        # What programs run from, or work offline with.
        "root/.cache/pypoetry/virtualenvs/app-py3.12/lib/x.py",
        "root/.cache/pdm/packages/x/lib/x.py",
        "root/.local/share/virtualenvs/app/lib/x.py",
        "root/.local/share/pipx/venvs/x/lib/x.py",
        "root/.local/share/uv/tools/x/lib/x.py",
        "root/.local/share/hatch/env/x",
        "root/.cache/pre-commit/repo/x",
        "root/app/.yarn/cache/left-pad.zip",
        "root/.yarn/cache/left-pad.zip",
        "root/.npm/_npx/0a/node_modules/x/index.js",
        "root/.cache/pnpm/dlx/0a/x",
        "root/.local/share/pnpm/store/v10/files/0a",
        "root/.cache/node/corepack/v1/yarn/4.0.0/yarn.js",
        "root/.cache/node-gyp/22.0.0/include/node/node.h",
        "root/.bun/install/cache/x",
        "root/.cache/deno/deps/x",
        "root/.cargo/registry/src/x.rs",
        "root/go/pkg/mod/x.go",
        "root/.cache/go-build/0a/x",
        "root/.m2/repository/x.jar",
        "root/.gradle/caches/x.jar",
        "root/.ivy2/cache/x.jar",
        "root/.cache/coursier/v1/x.jar",
        "root/.nuget/packages/x.dll",
        "root/.cache/R/renv/cache/x",
        "opt/conda/pkgs/x/info/index.json",
        "root/.cache/huggingface/model.bin",
        "root/.cache/torch/hub/model.pt",
        "root/.cache/ms-playwright/chromium",
        "root/.cache/puppeteer/chrome/x",
        "root/.cache/selenium/chromedriver/x",
        "root/.cache/matplotlib/fontlist.json",
        "root/nltk_data/corpora/x",
        "home/ann/.cache/anything/x",
        "var/backups/database.sql",
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


def test_a_daemon_keeps_its_directories(tree: Path) -> None:
    """It may not be able to make one in a directory of root's, nor with the right owner."""
    names = (
        *("var/cache/bind", "var/cache/apt/archives/partial", "var/lib/apt/lists/partial"),
        *("var/cache/man/de", "var/log/apache2", "var/log/journal", "var/log/postgresql.1"),
    )
    for name in names:
        grow(tree, {f"{name}/file": "x"})
        os.chown(tree / name, 105, 107)
        (tree / name).chmod(0o2750)
    scrub(tree)
    for name in names:
        found = (tree / name).stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (105, 107, 0o2750)


CACHE = "root/.cache/uv"
# A link of the image's, and what it leads to: all of them into what a rule would remove.
LINKS = {
    "absolute": ("opt/app/x.py", f"/{CACHE}/archive/ab/x.py"),
    "relative": ("opt/app/x.py", f"../../{CACHE}/archive/ab/x.py"),
    "to the cache itself": ("opt/app/cache", f"/{CACHE}"),
    "to a directory": ("opt/app/lib", f"../../{CACHE}/archive/ab/"),
    "through dots": ("opt/app/x", f"/opt/../{CACHE}/./archive/../archive/ab"),
    "above the root": ("opt/app/x", f"../../../../../{CACHE}/archive"),
    "beside it": ("root/.cache/mine", "uv/archive"),
    "from the home": ("root/x", ".cache/uv/archive/ab/x.py"),
    "through another link": ("opt/app/x.py", "/opt/alias/uv/archive/ab/x.py"),
    "into what is not there": ("opt/app/x.py", f"/{CACHE}/archive/gone/x.py"),
}


@pytest.mark.parametrize("kind", LINKS)
def test_what_a_link_of_the_image_leads_into_stays(tree: Path, kind: str) -> None:
    name, target = LINKS[kind]
    grow(tree, {f"{CACHE}/archive/ab/x.py": "x", f"{CACHE}/other": "o", "opt/app/": None})
    (tree / "opt/alias").symlink_to("/root/.cache")
    (tree / name).symlink_to(target)
    grow(tree, {"root/.cache/pip/x": "x"})
    assert set(scrub(tree)) == {"pip cache"}
    assert {f"{CACHE}/archive/ab/x.py", f"{CACHE}/other", name} <= files(tree)


def test_a_link_whose_way_leads_through_a_cache_keeps_that_cache(tree: Path) -> None:
    grow(tree, {f"{CACHE}/": None, "opt/data/x": "x"})
    (tree / CACHE / "way").symlink_to("/opt/data")
    (tree / "opt/x").symlink_to(f"/{CACHE}/way/x")
    scrub(tree)
    assert f"{CACHE}/way" in files(tree)


def test_links_within_what_goes_keep_nothing(tree: Path) -> None:
    """Nor do links to what is above it, nor a cache that is itself a link."""
    grow(tree, {f"{CACHE}/a/x": "x", "root/.cache/pip/y": "y", "var/tmp/t/": None})
    (tree / CACHE / "inner").symlink_to("a/x")
    (tree / CACHE / "across").symlink_to("../pip/y")
    (tree / "var/tmp/t/link").symlink_to(f"/{CACHE}/a")
    (tree / "opt").symlink_to("/root/.cache")
    (tree / "home").symlink_to("..")
    assert set(scrub(tree)) == {"uv cache", "pip cache", "temporary files"}
    assert files(tree) == {"etc/hostname", "opt", "home"}


def test_what_is_kept_keeps_what_it_leads_to(tree: Path) -> None:
    grow(tree, {f"{CACHE}/a/": None, "root/.cache/pip/y": "y", "var/tmp/z": "z", "opt/": None})
    (tree / CACHE / "a/on").symlink_to("/root/.cache/pip/y")
    (tree / "root/.cache/pip/on").symlink_to("/var/tmp/z")
    (tree / "opt/first").symlink_to(f"/{CACHE}/a")
    scrub(tree)
    assert {"root/.cache/pip/y", "var/tmp/z"} <= files(tree)


@pytest.mark.parametrize("mark", ["pyvenv.cfg", "conda-meta/history"])
@pytest.mark.parametrize("cache", [CACHE, "var/tmp/env", "root/.cache/pip/env", "var/cache/app"])
def test_an_environment_stays_wherever_it_is(tree: Path, mark: str, cache: str) -> None:
    grow(tree, {f"{cache}/deep/er/{mark}": "x", f"{cache}/deep/er/lib/x.py": "x"})
    assert scrub(tree) == {}
    assert f"{cache}/deep/er/lib/x.py" in files(tree)


@pytest.mark.parametrize(
    ("cache", "user"),
    [
        ("root/.npm/_cacache/x", "root/.npm/_npx/0a/package.json"),
        ("root/.cache/pnpm/metadata/x", "root/.cache/pnpm/dlx/0a/package.json"),
        ("root/.yarn/berry/cache/x.zip", "srv/app/.pnp.cjs"),
        ("home/ann/.yarn/berry/cache/x.zip", "srv/app/.pnp.js"),
    ],
)
def test_a_cache_stays_for_what_works_from_it(tree: Path, cache: str, user: str) -> None:
    grow(tree, {cache: "x"})
    grow(tree, {f"{Path(user).parent}/": None})
    grow(tree, {user: "x"})
    scrub(tree)
    assert cache in files(tree)
    (tree / user).unlink()
    if (parent := (tree / user).parent) != tree / "srv/app":
        parent.rmdir()
    assert scrub(tree) != {}
    assert cache not in files(tree)


def test_an_identity_goes_though_a_link_leads_to_it(tree: Path) -> None:
    grow(tree, {"var/lib/dbus/machine-id": "0123", "etc/ssh/ssh_host_rsa_key": "key"})
    (tree / "etc/machine-id").symlink_to("/var/lib/dbus/machine-id")
    (tree / "etc/key").symlink_to("ssh/ssh_host_rsa_key")
    scrub(tree)
    assert files(tree) == {"etc/hostname", "etc/machine-id", "etc/key"}


def test_too_many_links_to_remember_keep_everything(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hostruntime.image.scrub.references._MAX_PROTECTED", 5)
    grow(tree, {"opt/": None, "root/.cache/pip/x": "x", "etc/machine-id": "0123"})
    for number in range(7):
        grow(tree, {f"var/tmp/{number}": "x"})
        (tree / "opt" / str(number)).symlink_to(f"/var/tmp/{number}")
    assert set(scrub(tree)) == {"machine ids"}


def test_links_are_looked_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many caches there are: each link is read once, and each directory found once."""
    links = 500
    grow(tree, {f"home/p{number}/.cache/pip/x": "x" for number in range(20)})
    grow(tree, {"opt/app/": None, f"{CACHE}/archive/x": "x"})
    for number in range(links):
        (tree / f"opt/app/{number}").symlink_to(f"/{CACHE}/archive/x")
    calls = {"readlink": 0, "openat2": 0}
    for owner, name in ((os, "readlink"), (kernel, "openat2")):
        real = getattr(owner, name)

        def counted(*args: object, name: str = name, real: Any = real, **more: object) -> Any:
            calls[name] += 1
            return real(*args, **more)

        monkeypatch.setattr(owner, name, counted)
    scrub(tree)
    assert calls["openat2"] == 1
    assert calls["readlink"] <= links + 1


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
    calls = iter(range(20))

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
    assert files(tree) == {"etc/hostname", "var/log/link.log", "var/lib/apt/lists/link"}


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
