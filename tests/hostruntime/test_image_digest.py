"""An image's digest: the same for the same, another for anything that differs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostruntime.host.paths import StatePaths
from hostruntime.image.digest import _in_order, image_digest
from hostruntime.image.store import ImageManifest, ImageStore
from tests.hostruntime.trees_help import grow

BASE = {"etc/conf": "base", "bin/sh": "shell", "usr/lib/a/b/deep": "d", "usr/share/": None}
BLOCK = 64 * 1024


class Ground:
    """A base, and trees over it as a capture makes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = grow(root / "base", BASE)

    def over(self, name: str, own: dict[str, str | None], gone: tuple[str, ...] = ()) -> Path:
        tree = self.root / name
        for directory, names, files in os.walk(self.base):
            there = tree / Path(directory).relative_to(self.base)
            there.mkdir(parents=True)
            names.sort()
            for file in files:
                (there / file).hardlink_to(Path(directory, file))
        for path in (*gone, *own):
            (tree / path).unlink(missing_ok=True)
        return grow(tree, own)

    def digest(self, tree: Path, base_digest: str = "sha256:base") -> str:
        return image_digest(tree, self.base, base_digest)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


def test_it_is_the_same_whenever_it_was_made(ground: Ground) -> None:
    own: dict[str, str | None] = {"etc/new": "n", "srv/x/y": "y"}
    first, second = ground.over("one", own), ground.over("two", dict(reversed(own.items())))
    for path in sorted(second.rglob("*")):
        os.utime(path, (1, 1), follow_symlinks=False)
    digest = ground.digest(first)
    assert digest == ground.digest(second)
    assert digest.startswith("sha256:") and len(digest) == 71


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda tree: (tree / "etc/new").write_text("m"),
    "mode": lambda tree: (tree / "etc/new").chmod(0o600),
    "owner": lambda tree: os.chown(tree / "etc/new", 7, -1),
    "group": lambda tree: os.chown(tree / "etc/new", -1, 7),
    "a directory's mode": lambda tree: (tree / "usr/share").chmod(0o700),
    "the root's mode": lambda tree: tree.chmod(0o750),
    "name": lambda tree: (tree / "etc/new").rename(tree / "etc/other"),
    "one more": lambda tree: (tree / "etc/more").write_text(""),
    "an empty directory": lambda tree: (tree / "etc/more").mkdir(),
    "a link": lambda tree: (tree / "etc/more").symlink_to("new"),
    "a pipe": lambda tree: os.mkfifo(tree / "etc/more"),
    "one of the base's gone": lambda tree: (tree / "bin/sh").unlink(),
    "zeros at the end": lambda tree: os.truncate(tree / "etc/new", BLOCK * 3),
    "attribute": lambda tree: os.setxattr(tree / "etc/new", "user.mark", b"1"),
    "of the base, elsewhere": lambda tree: (tree / "etc/conf").rename(tree / "etc/moved"),
}


def test_whatever_differs_makes_another(ground: Ground) -> None:
    plain = ground.over("plain", {"etc/new": "n"})
    seen = {ground.digest(plain): "nothing", ground.digest(plain, "sha256:other"): "the base"}
    for number, (what, change) in enumerate(CHANGES.items()):
        tree = ground.over(f"tree{number}", {"etc/new": "n"})
        change(tree)
        digest = ground.digest(tree)
        assert digest not in seen, f"{what} looks like {seen[digest]}"
        seen[digest] = what


def test_a_link_counts_by_its_target_not_by_what_is_there(ground: Ground) -> None:
    outside = grow(ground.root / "outside", {"file": "1"})
    tree = ground.over("tree", {})
    (tree / "etc/link").symlink_to(outside)
    (tree / "etc/file").symlink_to(outside / "file")
    before = ground.digest(tree)
    (outside / "file").write_text("2")
    assert ground.digest(tree) == before


def test_a_hole_counts_as_the_zeros_it_reads_as(ground: Ground) -> None:
    for name in ("sparse", "dense"):
        tree = ground.over(name, {"data": "begin"})
        with (tree / "data").open("r+b") as file:
            if name == "dense":
                file.write(b"begin".ljust(BLOCK * 5, b"\0"))
            file.seek(BLOCK * 5)
            file.write(b"middle")
            if name == "dense":
                file.write(bytes(BLOCK * 4 - 6))
            file.truncate(BLOCK * 9)
    sparse, dense = (ground.root / name / "data" for name in ("sparse", "dense"))
    assert sparse.read_bytes() == dense.read_bytes()
    assert sparse.stat().st_blocks < dense.stat().st_blocks
    assert ground.digest(sparse.parent) == ground.digest(dense.parent)


def test_a_hole_of_terabytes_takes_no_time(ground: Ground) -> None:
    tree = ground.over("tree", {"huge": "begin"})
    os.truncate(tree / "huge", 8 << 40)
    reads = 0

    def check() -> None:
        nonlocal reads
        reads += 1

    image_digest(tree, ground.base, "", check)
    assert reads < 100


def test_it_can_be_ended(ground: Ground) -> None:
    def check() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        image_digest(ground.base, check=check)


def test_an_image_made_without_gets_one_and_keeps_it(tmp_path: Path) -> None:
    store = ImageStore(StatePaths(tmp_path / "state").ensure())
    staged = store.create_staging("img_old")
    tree = grow(staged / "tree", BASE)
    image = store.publish(staged, ImageManifest("img_old", "template", None, 1.0, 1, 1, 0))
    digest = store.digest(image)
    assert digest == image_digest(image.tree)
    assert not tree.exists()
    (image.tree / "etc/conf").write_text("never done to an image")
    assert store.digest(image) == digest


def test_names_are_in_the_order_of_their_bytes() -> None:
    plain = ["b", "a.b", "a", "B", "a-b"]
    strange = [*plain, "\udcff", "\udc80", "\uffff", "\U0001f600", "é"]
    for names in (plain, strange):
        assert _in_order(names) == sorted(names, key=os.fsencode)
    assert sorted(strange) != sorted(strange, key=os.fsencode)
