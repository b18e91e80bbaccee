"""What deleting an image gives back, from records: always what walking all of it would say."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from hostruntime.errors import ImageNotFound
from hostruntime.host.paths import StatePaths
from hostruntime.image import store as images_module
from hostruntime.image.capture import capture
from hostruntime.image.inode_record import NAME, InodeRecord
from hostruntime.image.store import Image, ImageManifest, ImageStore
from hostruntime.image.trees import TreeSize, inventory, measure
from tests.hostruntime.trees_help import grow

KIB = 1024


class Store(ImageStore):
    """One that makes images as an assembly does, from files to write and names to remove."""

    def make(
        self, name: str, below: str | None, files: dict[str, int], *, recorded: bool = True
    ) -> Image:
        base = self.acquire(below, name) if below is not None else None
        staged = self.create_staging(name)
        upper = grow(staged.with_name(f"{name}.upper"), {k: "x" * n for k, n in files.items()})
        nothing = grow(staged.with_name(f"{name}.nothing"), {})
        capture(base.tree if base is not None else nothing, upper, staged / "tree")
        shutil.rmtree(upper)
        found = inventory(staged / "tree")
        if recorded:
            self.record_inodes(staged, base, found)
        sizes = found.measure()
        manifest = ImageManifest(
            id=name,
            kind="template" if name.startswith("img_") else "base",
            base=below,
            created_at=time.time(),
            size_bytes=sizes.size_bytes,
            file_count=sizes.file_count,
            shared_bytes=sizes.shared_bytes,
        )
        image = self.publish(staged, manifest)
        if below is not None:
            self.release(below, name)
        return image

    def gone(self, name: str) -> None:
        self.delete(name)
        assert self.trash.wait()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(StatePaths(tmp_path / "state").ensure())


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on looking at every inode is a failure."""

    def walked(tree: Path) -> TreeSize:
        raise AssertionError(f"{tree} was walked")

    monkeypatch.setattr(images_module, "measure", walked)


def freed(store: ImageStore, name: str) -> int:
    found = store.usage(name)
    return found.size_bytes - found.shared_bytes


def by_walking(store: ImageStore, name: str) -> TreeSize:
    return measure(store.get(name).tree)


def own_directories(image: Image) -> int:
    return sum(path.is_dir() for path in image.tree.rglob("*")) + 1


def test_a_siblings_end_gives_what_was_shared_with_it_back_to_the_last(
    store: Store, no_walk: None
) -> None:
    store.make("debian-12", None, {"lib/big": 100 * KIB, "lib/small": 8 * KIB})
    one = store.make("img_1", "debian-12", {"own": 20 * KIB})
    store.make("img_2", "debian-12", {"lib/small": 4 * KIB})
    directories = 4 * KIB * own_directories(one)
    assert freed(store, "img_1") == 20 * KIB + directories
    # Made anew: the old generation goes, and what it gave is its two templates'.
    store.make("debian-12", None, {"lib/other": 4 * KIB})
    assert store.trash.wait()
    assert freed(store, "img_1") == 20 * KIB + 8 * KIB + directories
    store.gone("img_2")
    assert freed(store, "img_1") == 20 * KIB + 8 * KIB + 100 * KIB + directories
    assert store.usage("img_1").shared_bytes == 0


def test_what_is_made_over_a_template_keeps_its_part_of_it(store: Store, no_walk: None) -> None:
    store.make("debian-12", None, {"lib/big": 100 * KIB})
    one = store.make("img_1", "debian-12", {"own": 20 * KIB, "other": 4 * KIB})
    alone = freed(store, "img_1")
    two = store.make("img_2", "img_1", {"other": 12 * KIB})
    assert alone - freed(store, "img_1") == 20 * KIB
    store.gone("img_1")
    directories = 4 * KIB * own_directories(two)
    assert freed(store, "img_2") == 12 * KIB + 20 * KIB + directories
    with pytest.raises(ImageNotFound):
        store.usage(one.id)


@pytest.mark.parametrize("seed", range(6))
def test_the_records_say_what_a_walk_says(store: Store, seed: int) -> None:
    """Whatever is made over what, made anew, used, and deleted, in whatever order."""
    chance = random.Random(seed)
    unrecorded = seed >= 4
    names = ["debian-12"]
    store.make("debian-12", None, {f"d{n}/f": n * KIB for n in range(1, 9)})
    for number in range(25):
        act = chance.random()
        if act < 0.55:
            files = {f"d{chance.randint(1, 9)}/f": chance.randint(1, 50) * KIB for _ in range(3)}
            below, name = chance.choice(names), f"img_{number}"
            recorded = not (unrecorded and chance.random() < 0.4)
            store.make(name, below, files, recorded=recorded)
            names.append(name)
        elif act < 0.7:
            store.make("debian-12", None, {f"d{n}/f": n * KIB for n in range(1, 9)})
        elif len(names) > 1:
            name = names.pop(chance.randrange(1, len(names)))
            if chance.random() < 0.3:
                # It stays on disk, and so does what it shares.
                store.acquire(name, "sbx_1")
            store.gone(name)
        assert store.trash.wait()
        for name in names:
            assert store.usage(name) == by_walking(store, name), (number, name)


def test_a_record_that_does_not_hold_is_not_believed(store: Store, tmp_path: Path) -> None:
    store.make("debian-12", None, {"lib/big": 100 * KIB})
    image = store.make("img_1", "debian-12", {"own": 20 * KIB})
    directory = image.tree.parent
    assert InodeRecord.read(directory) is not None
    record = (directory / NAME).read_bytes()
    for damaged in (record[:-8], b"", b"{}\n", b"[1]\n", b"x" * 100_000):
        (directory / NAME).write_bytes(damaged)
        assert InodeRecord.read(directory) is None
        assert store.usage("img_1") == by_walking(store, "img_1")
    (directory / NAME).write_bytes(record)
    # As when the state directory was brought here from another disk: other inodes.
    image.tree.rename(tmp_path / "was")
    shutil.copytree(tmp_path / "was", image.tree)
    assert InodeRecord.read(directory) is None
    assert store.usage("img_1").shared_bytes == 0


def test_an_answer_is_kept_until_the_images_are_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.make("debian-12", None, {"lib/big": 100 * KIB})
    store.make("img_1", "debian-12", {"own": 20 * KIB})
    store.make("img_2", "img_1", {"more": 4 * KIB})
    first = store.usage("img_1")
    opened: list[object] = []
    real = os.open

    def counting(path: object, *args: int, **options: int) -> int:
        opened.append(path)
        return real(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", counting)
    monkeypatch.setattr(InodeRecord, "read", lambda _: pytest.fail("a record was read again"))
    assert store.usage("img_1") == first
    # The manifest says which image it is.
    assert {Path(str(path)).name for path in opened} <= {"image.json"}
    monkeypatch.undo()
    store.gone("img_2")
    assert store.usage("img_1").shared_bytes == first.shared_bytes - 20 * KIB
