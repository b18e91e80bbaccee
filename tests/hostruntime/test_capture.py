"""Capture, on writable layers made by hand in overlayfs's own language."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from hostruntime.host.tasks import Stop, StoppedError
from hostruntime.image import capture as capture_module
from hostruntime.image.capture import MOUNT_POINTS, OPAQUE, REDIRECT, capture
from hostruntime.image.trees import MAX_DEPTH, TreeTooDeep, measure
from tests.hostruntime.trees_help import grow, shape, whiteout
from tests.trees import tree_digest

OWN = set(MOUNT_POINTS)


class Layers:
    """A base, a writable layer, and what comes of them."""

    def __init__(self, root: Path) -> None:
        self.base = grow(root / "base", {})
        self.upper = grow(root / "upper", {})
        self.output = root / "output"

    def capture(self) -> capture_module.CaptureResult:
        before = tree_digest(self.base)
        result = capture(self.base, self.upper, self.output)
        assert tree_digest(self.base) == before
        return result

    def shape(self) -> dict[str, str]:
        return {name: what for name, what in shape(self.output).items() if name not in OWN}


@pytest.fixture
def layers(tmp_path: Path) -> Layers:
    return Layers(tmp_path)


def inode(path: Path) -> int:
    return path.lstat().st_ino


def test_untouched_files_are_links_and_changed_ones_are_the_layers_own(layers: Layers) -> None:
    grow(layers.base, {"usr/bin/tool": "tool", "etc/conf": "old"})
    grow(layers.upper, {"etc/conf": "new", "root/added": "added"})
    changed = inode(layers.upper / "etc/conf")
    result = layers.capture()
    assert layers.shape() == {
        "usr": "/",
        "usr/bin": "/",
        "usr/bin/tool": "tool",
        "etc": "/",
        "etc/conf": "new",
        "root": "/",
        "root/added": "added",
    }
    assert inode(layers.output / "usr/bin/tool") == inode(layers.base / "usr/bin/tool")
    assert inode(layers.output / "etc/conf") == changed
    assert (layers.base / "etc/conf").read_text() == "old"
    assert (result.moved, result.copied) == (2, 0)


def test_whiteouts_remove_and_are_not_captured(layers: Layers) -> None:
    grow(layers.base, {"etc/gone": "x", "etc/stays": "y", "opt/all/of/it": "z"})
    whiteout(layers.upper / "etc/gone")
    whiteout(layers.upper / "opt")
    whiteout(layers.upper / "etc/never-was-in-the-base")
    layers.capture()
    assert layers.shape() == {"etc": "/", "etc/stays": "y"}


def test_an_opaque_directory_hides_the_bases(layers: Layers) -> None:
    grow(layers.base, {"srv/old/file": "old", "srv/kept": "kept"})
    grow(layers.upper, {"srv/old/new": "new"})
    os.setxattr(layers.upper / "srv/old", OPAQUE, b"y")
    layers.capture()
    assert layers.shape() == {"srv": "/", "srv/kept": "kept", "srv/old": "/", "srv/old/new": "new"}
    assert OPAQUE not in os.listxattr(layers.output / "srv/old")


def test_a_renamed_directory_keeps_the_bases_content_and_its_own_changes(layers: Layers) -> None:
    grow(layers.base, {"lib/a/one": "1", "lib/a/two": "2", "lib/a/deep/three": "3"})
    grow(layers.upper, {"lib/b/one": "changed", "lib/b/deep/": None})
    os.setxattr(layers.upper / "lib/b", REDIRECT, b"a")
    whiteout(layers.upper / "lib/a")
    whiteout(layers.upper / "lib/b/two")
    layers.capture()
    assert layers.shape() == {
        "lib": "/",
        "lib/b": "/",
        "lib/b/one": "changed",
        "lib/b/deep": "/",
        "lib/b/deep/three": "3",
    }
    assert inode(layers.output / "lib/b/deep/three") == inode(layers.base / "lib/a/deep/three")


def test_a_directory_renamed_elsewhere_and_then_inside(layers: Layers) -> None:
    grow(layers.base, {"var/data/x/inner/f": "f", "var/data/g": "g"})
    grow(layers.upper, {"opt/new/y/": None, "var/": None})
    os.setxattr(layers.upper / "opt/new", REDIRECT, b"/var/data")
    os.setxattr(layers.upper / "opt/new/y", REDIRECT, b"x")
    whiteout(layers.upper / "opt/new/x")
    whiteout(layers.upper / "var/data")
    layers.capture()
    assert layers.shape() == {
        "var": "/",
        "opt": "/",
        "opt/new": "/",
        "opt/new/g": "g",
        "opt/new/y": "/",
        "opt/new/y/inner": "/",
        "opt/new/y/inner/f": "f",
    }


@pytest.mark.parametrize("target", [b"/etc/link", b"/../outside", b"..", b"/nowhere", b"missing"])
def test_a_redirect_that_leads_nowhere_or_out_shows_nothing(layers: Layers, target: bytes) -> None:
    grow(layers.base, {"etc/real/secret": "s"})
    grow(layers.base.parent / "outside", {"host-file": "h"})
    (layers.base / "etc/link").symlink_to("real")
    grow(layers.upper, {"etc/dir/own": "own"})
    os.setxattr(layers.upper / "etc/dir", REDIRECT, target)
    layers.capture()
    assert {name for name in layers.shape() if name.startswith("etc/dir/")} == {"etc/dir/own"}


def test_a_directory_takes_the_place_of_a_file_and_the_reverse(layers: Layers) -> None:
    grow(layers.base, {"a": "file", "b/inside": "x"})
    grow(layers.upper, {"a/now": "dir", "b": "file"})
    layers.capture()
    assert layers.shape() == {"a": "/", "a/now": "dir", "b": "file"}


def test_symlinks_are_never_followed(layers: Layers, tmp_path: Path) -> None:
    grow(tmp_path / "host", {"precious": "p"})
    grow(layers.base, {"etc/file": "e"})
    (layers.base / "to-host").symlink_to(tmp_path / "host")
    (layers.upper / "etc").symlink_to(tmp_path / "host")
    (layers.upper / "tmp").symlink_to(tmp_path / "host")
    (layers.upper / "dangling").symlink_to("/nowhere")
    before = tree_digest(tmp_path / "host")
    layers.capture()
    assert layers.shape() == {
        "to-host": f"-> {tmp_path}/host",
        "etc": f"-> {tmp_path}/host",
        "dangling": "-> /nowhere",
    }
    assert (layers.output / "tmp").is_dir() and not (layers.output / "tmp").is_symlink()
    assert tree_digest(tmp_path / "host") == before


def test_hard_links_inside_the_layer_stay_one_file(layers: Layers) -> None:
    grow(layers.upper, {"one/a": "same", "two/": None})
    os.link(layers.upper / "one/a", layers.upper / "two/b")
    os.link(layers.upper / "one/a", layers.upper / "one/c")
    layers.capture()
    assert inode(layers.output / "one/a") == inode(layers.output / "two/b")
    assert (layers.output / "one/c").stat().st_nlink == 3
    found = measure(layers.output)
    assert found.file_count == 3
    assert found.size_bytes < 64 * 1024


def test_devices_and_sockets_are_left_out_and_pipes_kept(layers: Layers) -> None:
    grow(layers.upper, {"d/": None})
    os.mknod(layers.upper / "d/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(layers.upper / "d/disk", stat.S_IFBLK | 0o660, os.makedev(8, 0))
    os.mkfifo(layers.upper / "d/pipe", 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(layers.upper / "d/socket"))
    result = layers.capture()
    assert layers.shape() == {"d": "/", "d/pipe": f"special {stat.S_IFIFO:o}"}
    assert result.omitted == 3


def test_mount_points_and_the_runtimes_directory_come_out_empty(layers: Layers) -> None:
    grow(layers.base, {"tmp/base": "b", "dev/": None, "usr/": None})
    grow(layers.upper, {".orkestr/init": "i", "workspace/w": "w", "tmp/t": "t", "proc/p": "p"})
    (layers.upper / "tmp").chmod(0o700)
    layers.capture()
    assert shape(layers.output) == {**dict.fromkeys(OWN, "/"), "usr": "/"}
    modes = {name: stat.S_IMODE((layers.output / name).stat().st_mode) for name in OWN}
    assert modes == dict(MOUNT_POINTS)


def test_odd_names_survive(layers: Layers) -> None:
    odd = [b"new\nline", b"\xff\xfe not utf-8", b"-rf", b"*", b" ", b"x" * 255, b"\\", b"'\"$(id)"]
    for directory in (layers.base / "lower", layers.upper / "upper"):
        directory.mkdir()
        for name in odd:
            (directory / os.fsdecode(name)).write_text("odd")
    layers.capture()
    for root in ("lower", "upper"):
        names = [os.fsencode(path.name) for path in (layers.output / root).iterdir()]
        assert sorted(names) == sorted(odd)


def test_metadata_comes_from_the_layer_else_from_the_base(layers: Layers) -> None:
    grow(layers.base, {"base-only/f": "f", "both/g": "g"})
    grow(layers.upper, {"both/": None, "own": "own"})
    for path, mode, owner, when in (
        (layers.base / "base-only", 0o2750, 33, 1_000_000_007),
        (layers.base / "both", 0o700, 1, 5),
        (layers.upper / "both", 0o1711, 1000, 1_234_567_890_123_456_789),
        (layers.upper / "own", 0o4755, 65_534, 42),
    ):
        os.chown(path, owner, owner + 1)
        path.chmod(mode)
        os.utime(path, ns=(when, when))
    layers.capture()
    found = {
        name: (stat.S_IMODE(s.st_mode), s.st_uid, s.st_gid, s.st_mtime_ns)
        for name in ("base-only", "both", "own")
        for s in [(layers.output / name).stat()]
    }
    assert found == {
        "base-only": (0o2750, 33, 34, 1_000_000_007),
        "both": (0o1711, 1000, 1001, 1_234_567_890_123_456_789),
        "own": (0o4755, 65_534, 65_535, 42),
    }


def test_overlay_attributes_are_dropped_and_a_persons_kept(layers: Layers) -> None:
    grow(layers.upper, {"d/f": "f"})
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    for path in (layers.upper / "d", layers.upper / "d/f"):
        os.setxattr(path, "trusted.overlay.origin", b"o")
        os.setxattr(path, "user.mine", b"m")
    os.setxattr(layers.upper / "d/f", "security.capability", capability)
    os.setxattr(layers.upper / "d/f", "security.other", b"label")
    layers.capture()
    assert os.listxattr(layers.output / "d") == ["user.mine"]
    assert sorted(os.listxattr(layers.output / "d/f")) == ["security.capability", "user.mine"]
    assert os.getxattr(layers.output / "d/f", "security.capability") == capability


def test_a_file_with_too_many_links_is_copied(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(layers.base, {"popular": "p" * 100_000, "other": "o"})
    (layers.base / "link").symlink_to("popular")
    os.mkfifo(layers.base / "pipe", 0o620)
    os.setxattr(layers.base / "popular", "user.mine", b"m")
    os.chown(layers.base / "popular", 7, 8)
    (layers.base / "popular").chmod(0o4711)
    os.utime(layers.base / "popular", ns=(3, 4))
    real = os.link

    def link(src: str, dst: str, **kwargs: Any) -> None:
        if src != "other":
            raise OSError(errno.EMLINK, "Too many links")
        real(src, dst, **kwargs)

    monkeypatch.setattr(os, "link", link)
    result = layers.capture()
    copy = (layers.output / "popular").stat()
    assert copy.st_ino != inode(layers.base / "popular")
    assert (copy.st_uid, copy.st_gid, stat.S_IMODE(copy.st_mode)) == (7, 8, 0o4711)
    assert copy.st_mtime_ns == 4
    assert os.getxattr(layers.output / "popular", "user.mine") == b"m"
    assert (layers.output / "popular").read_text() == "p" * 100_000
    assert layers.shape()["link"] == "-> popular"
    assert stat.S_ISFIFO((layers.output / "pipe").stat().st_mode)
    assert result.copied == 3


def test_other_link_failures_are_not_swallowed(
    layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(layers.base, {"f": "f"})

    def link(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="No space left"):
        layers.capture()


def test_bottomless_directories_are_refused_with_a_sentence(layers: Layers) -> None:
    here = os.open(layers.upper, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 5):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    with pytest.raises(TreeTooDeep, match="nested more than"):
        layers.capture()


def test_a_capture_stops_when_asked(layers: Layers) -> None:
    grow(layers.base, {"f": "f"})
    stop = Stop()
    stop.event.set()
    with pytest.raises(StoppedError):
        capture(layers.base, layers.upper, layers.output, stop.check)


def test_bytes_shared_with_the_base_are_counted_once(layers: Layers) -> None:
    grow(layers.base, {"big": "b" * 40_960, "same-as-big-by/": None})
    os.link(layers.base / "big", layers.base / "same-as-big-by/link")
    grow(layers.upper, {"own": "o" * 8_192})
    layers.capture()
    found = measure(layers.output)
    assert found.shared_bytes == 40_960
    assert found.file_count == 3
    directories = found.size_bytes - 40_960 - 8_192
    assert directories == 4096 * (2 + len(MOUNT_POINTS))
