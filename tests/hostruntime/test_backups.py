"""Images and snapshots in a backup: whole, copied once, told by their digest, and back again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from hostruntime.backup import volumes
from hostruntime.backup.vault import PARTIAL, Stored, Vault
from hostruntime.errors import VolumeMissing
from hostruntime.host.paths import Instance, StatePaths
from hostruntime.image.store import ImageStore, read_image
from hostruntime.image.trash import Trash
from hostruntime.image.trees import no_check
from hostruntime.sandbox.snapshots import Snapshot, read_snapshot
from hostruntime.volume.store import VolumeStore, locked
from tests.hostruntime.test_images import publish
from tests.trees import tree_digest

HOLE = 8 * 1024 * 1024


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths(tmp_path / "state").ensure()


@pytest.fixture
def store(paths: StatePaths) -> ImageStore:
    return ImageStore(paths)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "backup"
    made.mkdir(mode=0o700)
    return made


def vault(root: Path) -> Vault:
    made = Vault(root)
    made.prepare()
    return made


def images(store: ImageStore, paths: StatePaths) -> None:
    """A base, and an image over it that shares a file and has odd ones of its own."""
    base = publish(store, "debian-12", "below", kind="base")
    made = publish(store, "img_1", "own")
    os.link(base.tree / "etc/file", made.tree / "shared")
    os.link(made.tree / "etc/file", made.tree / "etc/second")
    os.chown(made.tree / "etc/file", 1234, 99)
    (made.tree / "link").symlink_to("/nowhere")
    os.mkfifo(made.tree / "pipe", 0o620)
    with (made.tree / "holes").open("wb") as file:
        file.truncate(HOLE)
        file.write(b"x")
    (made.tree / "etc").chmod(0o2751)
    os.setxattr(made.tree / "etc/file", "user.colour", b"red")


def snapshot(paths: StatePaths, name: str, image: str) -> Path:
    directory = paths.snapshots / name
    directory.mkdir(mode=0o700)
    with (directory / "disk.ext4").open("wb") as disk:
        disk.truncate(HOLE)
        disk.write(b"disk")
    record = Snapshot(name, "sbx_1", image, 100, 4096, time.time(), 1.0)
    (directory / "snapshot.json").write_text(json.dumps(asdict(record)))
    return directory


def restored(root: Path, stored: list[Stored], to: Path) -> StatePaths:
    back = StatePaths(to).ensure()
    Vault(root).restore(stored, back)
    return back


def test_what_comes_back_is_what_was_there(
    store: ImageStore, paths: StatePaths, root: Path, tmp_path: Path
) -> None:
    images(store, paths)
    taken = vault(root).take(paths, ["img_1"], [])
    assert [one.name.partition("@")[0] for one in taken.stored] == ["debian-12", "img_1"]
    assert len(taken.copied) == 2
    back = restored(root, taken.stored, tmp_path / "back")
    again = ImageStore(back)
    for name in ("debian-12", "img_1"):
        assert tree_digest(again.get(name).tree) == tree_digest(store.get(name).tree)
        assert again.get(name).manifest == store.get(name).manifest
    for where in (root / "images/img_1/content", back.images / "img_1"):
        assert (where / "tree/holes").stat().st_blocks * 512 < HOLE / 2
    tree, base = again.get("img_1").tree, again.get("debian-12").tree
    assert (tree / "shared").samefile(base / "etc/file")
    assert (tree / "etc/file").samefile(tree / "etc/second")
    assert not (tree / "shared").samefile(store.get("debian-12").tree / "etc/file")


def test_only_what_is_new_is_copied_and_shares_what_is_there(
    store: ImageStore, paths: StatePaths, root: Path
) -> None:
    images(store, paths)
    first = vault(root).take(paths, ["img_1"], [])
    inodes = {path: path.stat().st_ino for path in root.glob("images/*/content/tree")}
    new = publish(store, "img_2", "newer")
    os.link(store.get("debian-12").tree / "etc/file", new.tree / "shared")
    again = vault(root)
    second = again.take(paths, ["img_1", "img_2"], [])
    assert second.copied == ["the image img_2"]
    assert second.stored[: len(first.stored)] == first.stored
    assert (
        inodes.items() <= {p: p.stat().st_ino for p in root.glob("images/*/content/tree")}.items()
    )
    (base,) = root.glob("images/debian-12@*/content/tree/etc/file")
    assert (root / "images/img_2/content/tree/shared").samefile(base)
    # The content of the shared file was not copied: five letters, and two small records.
    assert again.progress.bytes < 1000
    third = vault(root)
    assert third.take(paths, ["img_1", "img_2"], []).copied == []
    assert third.progress.bytes == 0


def test_every_kind_of_damage_is_named(store: ImageStore, paths: StatePaths, root: Path) -> None:
    images(store, paths)
    publish(store, "img_2", "whole")
    taken = vault(root).take(paths, ["img_1", "img_2"], [])
    content = root / "images/img_1/content"

    def flip(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:-1] + b"!")

    damages: list[Callable[[], None]] = [
        lambda: flip(content / "tree/etc/file"),
        lambda: (content / "tree/link").unlink(),
        lambda: (content / "tree/added").touch(),
        lambda: (content / "tree/pipe").chmod(0o666),
        lambda: os.chown(content / "tree/holes", 7, 7),
        lambda: os.setxattr(content / "tree/etc/file", "user.colour", b"blue"),
        lambda: flip(content / "image.json"),
        lambda: shutil.rmtree(content),
    ]
    for damage in damages:
        kept = root.with_name("kept")
        shutil.rmtree(kept, ignore_errors=True)
        os.system(f"cp -a {root}/images/img_1 {kept}")
        damage()
        assert [line.partition(":")[0] for line in Vault(root).damaged(taken.stored)] == [
            "images/img_1"
        ]
        shutil.rmtree(root / "images/img_1")
        os.system(f"cp -a {kept} {root}/images/img_1")
        assert Vault(root).damaged(taken.stored) == []


def test_a_deleted_image_and_an_old_base_come_along_for_their_snapshots(
    store: ImageStore, paths: StatePaths, root: Path, tmp_path: Path
) -> None:
    publish(store, "debian-12", "old", kind="base")
    publish(store, "img_1", "deleted")
    for name, image in (("snap_1", "debian-12"), ("snap_2", "img_1")):
        snapshot(paths, name, image)
        store.acquire(image, f"snapshot.{name}")
    store.acquire("img_1", "sbx_1")
    publish(store, "debian-12", "new", kind="base")
    store.delete("img_1")
    taken = vault(root).take(paths, [], ["snap_1", "snap_2"])
    assert taken.lost == []
    back = restored(root, taken.stored, tmp_path / "back")
    again = ImageStore(back)
    again.recover({"snapshot.snap_1", "snapshot.snap_2"})
    assert not again.exists("img_1")
    for name, holder, text in (("img_1", "snap_2", "deleted"), ("debian-12", "snap_1", "old")):
        shared = again.share(name, f"snapshot.{holder}", "sbx_new")
        assert (shared.tree / "etc/file").read_text() == text
    assert (again.get("debian-12").tree / "etc/file").read_text() == "new"
    assert again.users("img_1") == {"snapshot.snap_2", "sbx_new"}
    found = read_snapshot(back.snapshots / "snap_1")
    assert found == read_snapshot(paths.snapshots / "snap_1")
    assert (back.snapshots / "snap_1/disk.ext4").stat().st_blocks * 512 < HOLE / 2


def test_what_goes_meanwhile_is_named_and_nothing_half_of_it_stays(
    store: ImageStore, paths: StatePaths, root: Path
) -> None:
    images(store, paths)
    publish(store, "img_2", "stays")
    (paths.images / "img_3").mkdir()
    calls = 0

    def deleting() -> None:
        nonlocal calls
        calls += 1
        if (root / PARTIAL / "content/tree").exists() and store.exists("img_1"):
            with os.scandir(root / PARTIAL / "content/tree") as scan:
                if any(entry.name == "holes" for entry in scan):
                    store.delete("img_1")
                    assert store.trash.wait(60)

    made = Vault(root, deleting)
    made.prepare()
    taken = made.take(paths, ["img_1", "img_2", "img_3", "img_4"], ["snap_9"])
    assert calls
    assert sorted(taken.lost) == [f"the image img_{n}" for n in (1, 3, 4)] + ["the snapshot snap_9"]
    assert {one.name.partition("@")[0] for one in taken.stored} == {"debian-12", "img_2"}
    assert not (root / "images/img_1").exists()
    assert not (root / PARTIAL).exists()
    assert Vault(root).damaged(taken.stored) == []


@pytest.fixture
def small(root: Path) -> Iterator[Path]:
    """A backup directory on a file system that has 3 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "small", root], check=True)
    yield root
    subprocess.run(["umount", root], check=True)


def test_on_a_full_disk_nothing_half_counts_and_a_repeat_goes_on(
    store: ImageStore, paths: StatePaths, small: Path
) -> None:
    root, names = small, [f"img_{number}" for number in range(1, 6)]
    publish(store, "debian-12", "below", kind="base")
    for name in names:
        publish(store, name, "x").tree.joinpath("large").write_bytes(os.urandom(1_000_000))
    with pytest.raises(OSError, match="No space"):
        vault(root).take(paths, names, [])
    done = len(list(root.glob("images/*")))
    assert 1 < done < 6
    subprocess.run(["mount", "-o", "remount,size=30m", root], check=True)
    again = vault(root)
    assert not (root / PARTIAL).exists()
    taken = again.take(paths, names, [])
    assert len(taken.stored) == 6
    assert len(taken.copied) == 6 - done
    assert Vault(root).damaged(taken.stored) == []
    # What no backup names goes, the rest stays.
    again.prune({one.path for one in taken.stored if one.name != "img_3"})
    assert [line.partition(":")[0] for line in Vault(root).damaged(taken.stored)] == [
        "images/img_3"
    ]


def test_a_copy_that_shares_damage_is_not_taken_for_good(
    store: ImageStore, paths: StatePaths, root: Path
) -> None:
    images(store, paths)
    vault(root).take(paths, ["img_1"], [])
    (base,) = root.glob("images/debian-12@*/content/tree/etc/file")
    base.write_text("below"[::-1])
    new = publish(store, "img_2", "newer")
    os.link(store.get("debian-12").tree / "etc/file", new.tree / "shared")
    with pytest.raises(Exception, match="is not what was copied") as caught:
        vault(root).take(paths, ["img_1", "img_2"], [])
    assert "--verify" in str(caught.value)
    assert not (root / "images/img_2").exists()
    assert read_image(new.tree.parent) == new


# Volumes -------------------------------------------------------------------------------------


def test_volumes_are_copied_with_their_holes_shared_told_and_brought_back(
    paths: StatePaths, tmp_path: Path
) -> None:
    for name, text in (("vol_1", b"one"), ("vol_2", b"two")):
        with (paths.volumes / f"{name}.ext4").open("wb") as file:
            file.truncate(HOLE)
            file.seek(HOLE // 2 + 5)
            file.write(text)
    backups = [tmp_path / name for name in ("first", "second")]
    for backup in backups:
        backup.mkdir()
    # No agent runs: they are copied from where they are.
    names = ["vol_1", "vol_2", "vol_gone"]
    taken = volumes.take(paths, tmp_path / "no-socket", names, backups[0], {})
    assert [one.name for one in taken.stored] == ["vol_1", "vol_2"]
    [lost] = taken.lost
    assert "vol_gone" in lost
    earlier = {one: backups[0] / "volumes" / one.file for one in taken.stored}
    with (paths.volumes / "vol_2.ext4").open("r+b") as file:
        file.write(b"changed")
    with locked(paths.volumes / "vol_2.ext4"):
        # A sandbox has it, and there is no agent who could make a copy.
        refused = volumes.take(paths, tmp_path / "no-socket", ["vol_2"], tmp_path, {})
        assert "vol_2" in refused.lost[0]
    again = volumes.take(paths, tmp_path / "no-socket", names, backups[1], earlier)
    inodes = [
        [(backup / "volumes" / f"vol_{number}.ext4").stat().st_ino for backup in backups]
        for number in (1, 2)
    ]
    assert inodes[0][0] == inodes[0][1]
    assert inodes[1][0] != inodes[1][1]
    copy = backups[1] / "volumes" / "vol_2.ext4"
    assert copy.stat().st_blocks * 512 < HOLE // 4
    assert volumes.damaged(backups[1], again.stored) == []
    back = StatePaths(tmp_path / "back").ensure()
    volumes.restore(backups[1], again.stored, back)
    for name in ("vol_1.ext4", "vol_2.ext4"):
        assert (back.volumes / name).read_bytes() == (paths.volumes / name).read_bytes()
    with copy.open("r+b") as file:
        file.seek(HOLE - 100)
        file.write(b"x")
    assert volumes.damaged(backups[1], again.stored) == [
        "second/volumes/vol_2.ext4: it is not what was put there"
    ]


def test_the_copy_of_a_deleted_volume_goes_with_it(paths: StatePaths) -> None:
    """A backup may die, or not wait any more, before it has taken the copy away."""
    store = VolumeStore(paths, Instance(7), Trash(paths))
    (paths.volumes / "vol_1.ext4").write_bytes(b"secret")
    copy = store.copy("vol_1")
    assert copy.exists()
    store.delete("vol_1")
    assert not any(paths.volumes.iterdir())


def test_a_copy_that_is_removed_meanwhile_costs_the_backup_no_other(
    paths: StatePaths, tmp_path: Path
) -> None:
    agent = SimpleNamespace(copy_volume=lambda _: None)
    with pytest.raises(VolumeMissing):
        volumes._copy(paths, agent, "vol_1", tmp_path / "to", no_check)  # type: ignore[arg-type]
