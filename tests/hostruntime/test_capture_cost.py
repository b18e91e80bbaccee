"""What capturing and describing an image of many small files costs: calls, not seconds.

The writable layer is on a file system of its own, as a container's is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hostruntime.host.progress import Progress
from hostruntime.image.capture import CaptureResult, capture
from hostruntime.image.content_hash import BLOCK, ContentHashCache, content_hash
from hostruntime.image.copying import SMALL_BYTES
from hostruntime.image.digest import image_digest
from hostruntime.image.trees import inventory
from tests.hostruntime.trees_help import grow

CALLS = (
    *("open", "close", "read", "pread", "write", "sendfile", "lseek", "ftruncate", "rename"),
    *("stat", "fstat", "listxattr", "getxattr", "setxattr", "utime", "chown", "fchown"),
    *("chmod", "fchmod", "unlink", "link", "mkdir", "scandir", "readlink"),
)


@pytest.fixture
def upper() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield root
    shutil.rmtree(root)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each call of :mod:`os` was made."""
    counts: Counter[str] = Counter()

    def counting(name: str, real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        yield counts


def per_file(count: int, more: int, costs: dict[int, Counter[str]]) -> dict[str, float]:
    """What each file more cost."""
    names = costs[more].keys()
    each = {name: (costs[more][name] - costs[count][name]) / (more - count) for name in names}
    return {name: cost for name, cost in each.items() if cost}


def made_of(root: Path, count: int) -> Path:
    return grow(root, {f"srv/{n % 10}/f{n}.js": f"module {n}" for n in range(count)})


def test_each_small_file_costs_few_calls_and_is_read_once(upper: Path, tmp_path: Path) -> None:
    base = grow(tmp_path / "base", {"etc/f": "f"})
    copying: dict[int, Counter[str]] = {}
    describing: dict[int, Counter[str]] = {}
    for count in (100, 300):
        layer, tree = made_of(upper / str(count), count), tmp_path / f"tree{count}"
        with counted() as copying[count]:
            found = capture(base, layer, tree)
        with counted() as describing[count]:
            inventory(tree)
            image_digest(tree, base, known=found.known)
    assert per_file(100, 300, copying) == {
        **{"open": 2, "read": 1, "write": 1, "close": 2},
        **{"fstat": 3, "listxattr": 1, "utime": 1},
    }
    # The inventory's is the directory entry's own, which is not counted.
    assert per_file(100, 300, describing) == {"stat": 1}


def varied(layer: Path) -> None:
    """Files of each kind that a capture treats in a way of its own."""
    sizes = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, SMALL_BYTES, SMALL_BYTES + 1, 5 * BLOCK + 7)
    for size in sizes:
        (layer / f"random-{size}").write_bytes(os.urandom(size))
        (layer / f"zeros-{size}").write_bytes(bytes(size))
        with (layer / f"hole-{size}").open("wb") as file:
            file.truncate(size)
    with (layer / "hole-and-end").open("wb") as file:
        file.seek(100_000)
        file.write(b"end")
    (layer / "zeros-then-data").write_bytes(bytes(BLOCK) + b"data")
    os.link(layer / "random-1", layer / "another-name")
    os.link(layer / f"random-{SMALL_BYTES + 1}", layer / "large-by-another-name")
    (layer / "link").symlink_to("random-1")
    os.mkfifo(layer / "pipe")
    (layer / "setuid").write_text("s")
    os.chown(layer / "setuid", 1000, 1001)
    (layer / "setuid").chmod(0o6751)
    (layer / "open-to-all").write_text("o")
    (layer / "open-to-all").chmod(0o777)
    (layer / "attributed").write_text("a")
    os.setxattr(layer / "attributed", "user.k", b"v")


def captured(upper: Path, tmp_path: Path) -> tuple[Path, CaptureResult]:
    base = grow(tmp_path / "base", {"etc/f": "f"})
    varied(grow(upper / "layer", {"a/b": "b"}))
    copy = tmp_path / "copy"
    shutil.copytree(upper / "layer", copy, symlinks=True, ignore=lambda *_: ["pipe"])
    found = capture(base, upper / "layer", tmp_path / "tree")
    return copy, found


def test_what_is_known_makes_no_other_digest(upper: Path, tmp_path: Path) -> None:
    copy, found = captured(upper, tmp_path)
    tree = tmp_path / "tree"
    assert image_digest(tree, tmp_path / "base", known=found.known) == image_digest(
        tree, tmp_path / "base"
    )
    for path in copy.rglob("*"):
        if path.is_file() and not path.is_symlink():
            assert (tree / path.relative_to(copy)).read_bytes() == path.read_bytes(), path
    assert (tree / "hole-and-end").stat().st_blocks < 100_000 // 512
    assert (tree / "large-by-another-name").samefile(tree / f"random-{SMALL_BYTES + 1}")
    assert (tree / "another-name").samefile(tree / "random-1")
    made = (tree / "setuid").stat()
    assert (made.st_uid, made.st_gid, made.st_mode & 0o7777) == (1000, 1001, 0o6751)
    assert (tree / "open-to-all").stat().st_mode & 0o7777 == 0o777
    assert os.getxattr(tree / "attributed", "user.k") == b"v"


def rewrite(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def rewrite_and_set_back(path: Path) -> None:
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.write_bytes(b"y" * size)


def add_attribute(path: Path) -> None:
    os.setxattr(path, "user.new", b"1")


@pytest.mark.parametrize("change", [rewrite, rewrite_and_set_back, replace, add_attribute])
def test_what_has_changed_since_is_not_believed(upper: Path, tmp_path: Path, change: Any) -> None:
    base = grow(tmp_path / "base", {})
    found = capture(base, made_of(upper / "layer", 3), tmp_path / "tree")
    before = image_digest(tmp_path / "tree", base, known=found.known)
    change(tmp_path / "tree/srv/1/f1.js")
    after = image_digest(tmp_path / "tree", base, known=found.known)
    assert after == image_digest(tmp_path / "tree", base) != before


def test_a_stamp_of_another_inode_is_none(tmp_path: Path) -> None:
    known = ContentHashCache()
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    known.add((tmp_path / "a").stat(), content_hash(b"a"))
    assert known.lookup((tmp_path / "a").stat()) == content_hash(b"a")
    assert known.lookup((tmp_path / "b").stat()) is None


def test_what_has_been_done_is_counted(upper: Path, tmp_path: Path) -> None:
    base = grow(tmp_path / "base", {"etc/f": "f"})
    (made_of(upper / "layer", 20) / "large").write_bytes(bytes(SMALL_BYTES + 1))
    done = Progress()
    known = capture(base, upper / "layer", tmp_path / "tree", progress=done).known
    sizes = sum(len(f"module {n}") for n in range(20)) + SMALL_BYTES + 1
    assert (done.files, done.bytes) == (22, sizes)
    done = Progress()
    image_digest(tmp_path / "tree", base, known=known, progress=done)
    assert (done.files, done.bytes) == (21, sizes)


def test_a_full_disk_leaves_nothing_open(
    upper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = grow(tmp_path / "base", {})
    layer = made_of(upper / "layer", 3)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        capture(base, layer, tmp_path / "tree")
    monkeypatch.undo()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
