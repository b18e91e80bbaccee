"""The image store: published whole, used by many, deleted when the last has gone."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from hostruntime.errors import Conflict, ImageNotFound, InvalidRequest
from hostruntime.host.paths import StatePaths
from hostruntime.image.quarantine import DEFAULT_DAYS, retention_days
from hostruntime.image.store import Image, ImageManifest, ImageStore
from hostruntime.image.trash import Trash
from tests.hostruntime.trees_help import grow
from tests.trees import tree_digest


@pytest.fixture
def paths(tmp_path: Path) -> StatePaths:
    return StatePaths(tmp_path / "state").ensure()


@pytest.fixture
def store(paths: StatePaths) -> ImageStore:
    return ImageStore(paths)


def publish(store: ImageStore, name: str, text: str = "x", *, kind: str = "template") -> Image:
    staged = store.create_staging(name)
    grow(staged / "tree", {"etc/file": text})
    manifest = ImageManifest(
        id=name,
        kind="base" if kind == "base" else "template",
        base=None,
        created_at=time.time(),
        size_bytes=10,
        file_count=1,
        shared_bytes=0,
    )
    return store.publish(staged, manifest)


def on_disk(paths: StatePaths) -> set[str]:
    return {entry.name.partition("@")[0] for entry in paths.images.iterdir()}


def test_a_published_image_is_found_and_listed(store: ImageStore, paths: StatePaths) -> None:
    image = publish(store, "img_1")
    publish(store, "debian-12", kind="base")
    assert store.get("img_1") == image
    assert (image.tree / "etc/file").read_text() == "x"
    assert [found.id for found in store.list()] == ["img_1", "debian-12"]
    assert list(paths.staging.iterdir()) == []


def test_an_alias_finds_the_image_that_replaced_it(store: ImageStore) -> None:
    publish(store, "debian-12", kind="base")
    assert store.get("ubuntu-24.04").id == "debian-12"
    store.acquire("ubuntu-24.04", "sbx_1")
    assert store.users("debian-12") == {"sbx_1"}


@pytest.mark.parametrize(
    "name", ["", "..", "../images", "a/b", ".hidden", "debian-12@1", "x" * 200]
)
def test_a_name_that_is_no_name_is_not_found(store: ImageStore, name: str) -> None:
    publish(store, "debian-12", kind="base")
    with pytest.raises(ImageNotFound):
        store.get(name)
    assert store.exists(name) is False
    assert store.delete(name) is True


def test_a_user_must_have_a_plain_name(store: ImageStore) -> None:
    publish(store, "img_1")
    with pytest.raises(InvalidRequest):
        store.acquire("img_1", "../../etc/passwd")


def test_an_id_is_published_once(store: ImageStore) -> None:
    publish(store, "img_1", "first")
    with pytest.raises(Conflict):
        publish(store, "img_1", "second")
    assert (store.get("img_1").tree / "etc/file").read_text() == "first"


def test_deleting_an_unused_image_gives_its_disk_back(store: ImageStore, paths: StatePaths) -> None:
    publish(store, "img_1")
    assert store.delete("img_1") is True
    assert store.delete("img_1") is True
    assert store.trash.wait()
    assert on_disk(paths) == set()
    assert list(paths.trash.iterdir()) == []


def test_deletion_waits_for_the_last_user(store: ImageStore, paths: StatePaths) -> None:
    tree = publish(store, "img_1").tree
    store.acquire("img_1", "sbx_1")
    store.acquire("img_1", "sbx_1")
    store.acquire("img_1", "sbx_2")
    assert store.delete("img_1") is False
    with pytest.raises(ImageNotFound):
        store.acquire("img_1", "sbx_3")
    assert store.list() == []
    store.release("img_1", "sbx_1")
    assert (tree / "etc/file").read_text() == "x"
    store.release("img_1", "sbx_2")
    store.release("img_1", "sbx_2")
    assert not tree.exists()
    assert store.trash.wait()
    assert list(paths.trash.iterdir()) == []


def test_a_used_image_that_is_not_deleted_survives_its_users(store: ImageStore) -> None:
    publish(store, "img_1")
    store.acquire("img_1", "sbx_1")
    store.release("img_1", "sbx_1")
    assert store.exists("img_1")


def test_a_base_made_anew_leaves_the_old_one_to_its_users(
    store: ImageStore, paths: StatePaths
) -> None:
    old = publish(store, "debian-12", "old", kind="base")
    store.acquire("debian-12", "sbx_1")
    new = publish(store, "debian-12", "new", kind="base")
    assert (old.tree / "etc/file").read_text() == "old"
    assert (store.get("debian-12").tree / "etc/file").read_text() == "new"
    store.acquire("debian-12", "sbx_2")
    store.release("debian-12", "sbx_1")
    assert not old.tree.exists()
    assert new.tree.exists()
    assert store.users("debian-12") == {"sbx_2"}
    assert [image.id for image in store.list()] == ["debian-12"]


def test_a_base_can_be_deleted_while_used(store: ImageStore) -> None:
    tree = publish(store, "debian-12", kind="base").tree
    store.acquire("debian-12", "sbx_1")
    assert store.delete("debian-12") is False
    assert not store.exists("debian-12")
    assert tree.exists()
    store.release("debian-12", "sbx_1")
    assert not tree.exists()


def test_a_deferred_deletion_holds_when_the_agent_starts_again(
    store: ImageStore, paths: StatePaths
) -> None:
    publish(store, "img_1")
    publish(store, "img_2")
    store.acquire("img_1", "sbx_alive")
    store.acquire("img_1", "sbx_dead")
    store.acquire("img_2", "sbx_dead")
    store.delete("img_1")
    store.delete("img_2")
    again = ImageStore(paths)
    again.recover({"sbx_alive"})
    assert not again.exists("img_1")
    assert on_disk(paths) == {"img_1"}
    again.release("img_1", "sbx_alive")
    assert on_disk(paths) == set()


def test_recovery_clears_what_a_killed_agent_left(paths: StatePaths) -> None:
    store = ImageStore(paths)
    publish(store, "debian-12", "current", kind="base")
    grow(paths.staging / "img_half/tree", {"a": "a"})
    grow(paths.images / "debian-12@1/tree", {"killed": "before the link was swapped"})
    (paths.images / "debian-12@1/image.json").write_text("{}")
    grow(paths.images / "img_no_manifest/tree", {"a": "a"})
    grow(paths.trash / "was-being-unlinked", {"a/b/c": "c"})
    again = ImageStore(paths)
    again.recover(set())
    assert again.trash.wait()
    assert on_disk(paths) == {"debian-12"}
    assert (again.get("debian-12").tree / "etc/file").read_text() == "current"
    assert list(paths.staging.iterdir()) == list(paths.trash.iterdir()) == []


def test_what_nobody_knows_is_set_aside_a_few_at_a_time(store: ImageStore) -> None:
    publish(store, "debian-12", kind="base")
    unknown = [f"img_orphan{number}" for number in range(5)]
    for name in ("img_kept", "img_used", *unknown):
        publish(store, name)
    store.acquire("img_used", "sbx_1")
    assert store.reconcile({"img_kept"}) == ([], []), "they are young"
    first, waiting = store.reconcile({"img_kept"}, limit=3, older_than=-1)
    assert sorted([*first, *waiting]) == unknown
    assert len(first) == 3
    assert {held.name for held in store.quarantine.list()} == set(first)
    assert store.reconcile({"img_kept"}, limit=3, older_than=-1) == (waiting, [])
    assert {image.id for image in store.list()} == {"debian-12", "img_kept", "img_used"}


def test_what_was_put_back_stays_until_a_row_names_it(store: ImageStore) -> None:
    publish(store, "img_one")
    tree = store.get("img_one").tree
    digest = tree_digest(tree)
    store.reconcile(set(), older_than=-1)
    assert not tree.exists()
    (held,) = store.quarantine.list()
    store.restore(held)
    assert store.quarantine.list() == []
    assert tree_digest(store.get("img_one").tree) == digest
    assert store.reconcile(set(), older_than=-1) == ([], [])
    # Once a row has named it, it is as any other.
    assert store.reconcile({"img_one"}, older_than=-1) == ([], [])
    assert store.reconcile(set(), older_than=-1) == (["img_one"], [])


def test_quarantine_is_emptied_after_days_and_not_before(store: ImageStore) -> None:
    publish(store, "img_one")
    store.reconcile(set(), older_than=-1)
    assert store.quarantine.purge(days=1.0) == []
    assert [held.name for held in store.quarantine.purge(days=-1.0)] == ["img_one"]
    assert store.trash.wait()
    assert store.quarantine.list() == []


def test_an_entry_without_its_content_is_no_entry(store: ImageStore, paths: StatePaths) -> None:
    publish(store, "img_one")
    store.reconcile(set(), older_than=-1)
    # An agent that was killed as it put the image back.
    (paths.quarantine / "image.img_one/content").rename(paths.images / "img_one")
    again = ImageStore(paths)
    again.recover(set())
    assert again.trash.wait()
    assert list(paths.quarantine.iterdir()) == []
    assert again.exists("img_one")


def test_what_cannot_be_set_aside_keeps_nobody_from_the_rest(
    store: ImageStore, paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    publish(store, "img_good")
    publish(store, "img_bad")
    (paths.images / "img_bad/image.json").write_text("{}")
    monkeypatch.setattr("hostruntime.image.quarantine.write_json", full)
    again = ImageStore(paths)
    again.recover(set())
    assert [image.id for image in again.list()] == ["img_good"]
    assert (paths.images / "img_bad/tree/etc/file").read_text() == "x"
    with pytest.raises(OSError, match="No space"):
        again.reconcile(set(), older_than=-1)
    assert again.exists("img_good")
    monkeypatch.undo()
    again.recover(set())
    assert [held.name for held in again.quarantine.list()] == ["img_bad"]


@pytest.mark.parametrize("days", ["none", "0", "-1", "nan", "1e9"])
def test_days_that_are_none_are_refused(days: str) -> None:
    with pytest.raises(InvalidRequest, match="ORKESTR_QUARANTINE_DAYS"):
        retention_days({"ORKESTR_QUARANTINE_DAYS": days})
    assert retention_days({}) == DEFAULT_DAYS
    assert retention_days({"ORKESTR_QUARANTINE_DAYS": "2.5"}) == 2.5


def test_a_failed_publication_shows_nothing(
    store: ImageStore, paths: StatePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hostruntime.host.kernel.syncfs", full)
    with pytest.raises(OSError, match="No space"):
        publish(store, "img_1")
    assert not store.exists("img_1")
    assert on_disk(paths) == set()


def test_usage_says_what_deleting_would_free(store: ImageStore) -> None:
    base = publish(store, "debian-12", "b" * 20_000, kind="base")
    staged = store.create_staging("img_1")
    grow(staged / "tree", {"own": "o" * 8_000})
    os.link(base.tree / "etc/file", staged / "tree/shared")
    os.link(staged / "tree/own", staged / "tree/own-again")
    store.publish(staged, ImageManifest("img_1", "template", "debian-12", 0.0, 0, 0, 0))
    found = store.usage("img_1")
    assert found.shared_bytes == 20_480
    assert found.size_bytes == 20_480 + 8_192 + 4_096
    store.delete("debian-12")
    assert store.trash.wait()
    assert store.usage("img_1").shared_bytes == 0


def test_the_trash_takes_any_depth_and_follows_nothing(paths: StatePaths, tmp_path: Path) -> None:
    outside = grow(tmp_path / "outside", {"precious": "p"})
    victim = grow(tmp_path / "state/victim", {"a/b/c": "c", "d": "d"})
    (victim / "a/link").symlink_to(outside)
    (victim / "to-dir").symlink_to(outside, target_is_directory=True)
    here = os.open(victim, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deep", dir_fd=here)
        inner = os.open("deep", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    trash = Trash(paths)
    trash.discard(victim)
    assert not victim.exists()
    assert trash.wait()
    assert list(paths.trash.iterdir()) == []
    assert (outside / "precious").read_text() == "p"


def test_discarding_what_is_not_there_is_fine(paths: StatePaths) -> None:
    trash = Trash(paths)
    trash.discard(paths.root / "nothing")
    assert trash.wait()


def test_to_begin_and_end_a_use_looks_at_no_other_user_or_image(
    store: ImageStore, paths: StatePaths
) -> None:
    """Counted in calls of Python's and the system's, of which each listed name takes some."""
    users = publish(store, "debian-12", kind="base").tree.parent / "users"
    users.mkdir()
    took = []
    for number in range(1, 102):
        (users / f"sbx_{number}").touch()
        (paths.images / f"img_{number}").mkdir()
        if number in {1, 101}:
            took.append(calls(lambda: use_once(store)))
    # One look at the name of each image.
    assert took[1] <= took[0] + 150, took


def use_once(store: ImageStore) -> None:
    store.acquire("debian-12", "one.more")
    store.release("debian-12", "one.more")


def calls(work: Callable[[], None]) -> int:
    """How many functions, Python's own and builtin ones, are called."""
    count = 0

    def counting(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(counting)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
