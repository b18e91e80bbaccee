"""Whatever a container does to its files, the image is what the container saw.

Operations made up by Hypothesis run on a real overlay with the options of
:mod:`hostruntime.container.rootfs`, in a process whose root is that overlay: a link to
``/etc/passwd`` is one to the overlay's, whatever is done through it. What the mount shows is then
compared with what the capture makes of the layer, the layer being on a file system of its own as a
container's is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostruntime.container.disk import Disks
from hostruntime.container.rootfs import _OPTIONS
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.image.capture import MOUNT_POINTS, capture
from tests.trees import tree_digest

pytestmark = pytest.mark.host

# Few names, so that operations meet; some that a careless program trips over.
NAMES = ["a", "b", "c d", "new\nline", os.fsdecode(b"\xff\xfe"), "é" * 60, "-rf", "*"]
Operation = tuple[str, str, str, int]


class Ground:
    """A base and an empty layer on a disk of its own."""

    def __init__(self, root: Path, disks: Disks) -> None:
        self.disks = disks
        root.mkdir(exist_ok=True)
        self.base, self.merged, self.output = (root / n for n in ("base", "merged", "output"))
        shutil.rmtree(self.output, ignore_errors=True)
        if not self.base.exists():
            _plant(self.base)
        disk = disks.attach("property", 64)
        for name in ("upper", "work"):
            (disk / name).mkdir()
        self.upper = disk / "upper"
        self.merged.mkdir(exist_ok=True)
        layers = f"lowerdir={self.base},upperdir={self.upper},workdir={disk / 'work'}"
        kernel.mount("overlay", self.merged, "overlay", kernel.MS_NODEV, f"{layers},{_OPTIONS}")

    def close(self) -> None:
        with suppress(OSError):
            kernel.umount(self.merged)
        self.disks.release("property")


def _plant(base: Path) -> None:
    for name in ("a/b/c d", "b/a", "c d", "etc", *MOUNT_POINTS):
        (base / name).mkdir(parents=True)
    for name in ("etc/passwd", "a/f", "a/b/f", "a/b/c d/f", "b/a/f", "f"):
        (base / name).write_text(f"base {name}")
    (base / "link").symlink_to("a")
    (base / "a/setuid").write_bytes(b"s")
    (base / "a/setuid").chmod(0o4755)


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disks]:
    paths = StatePaths(tmp_path_factory.mktemp("property")).ensure()
    instance = claim_instance(paths)
    found = Disks(paths, instance)
    passwd = Path("/etc/passwd").read_bytes()
    try:
        yield found
    finally:
        assert Path("/etc/passwd").read_bytes() == passwd
        for owner in found.owners():
            found.release(owner)
        shutil.rmtree(found.mounts.parent, ignore_errors=True)
        release_instance(paths)


def _write(root: Path, one: str, other: str, number: int) -> None:
    # Opening a FIFO would wait for its other end.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
    with open(os.open(root / one, flags, 0o644), "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(other.encode("utf-8", "surrogateescape") * (number % 7))


def _sparse(root: Path, one: str, _: str, number: int) -> None:
    os.truncate(root / one, number * 101)


def _remove(root: Path, one: str, _: str, __: int) -> None:
    path = root / one
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _attribute(root: Path, one: str, other: str, number: int) -> None:
    os.setxattr(root / one, f"user.k{number % 3}", other.encode("utf-8", "surrogateescape"))


def act(root: Path, operations: list[Operation]) -> None:
    """Do what can be done of the operations, in a child that cannot leave ``root``."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chroot(root)
            os.chdir("/")
            for action, one, other, number in operations:
                with suppress(OSError, ValueError):
                    ACTIONS[action](Path("/"), one, other, number)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


ACTIONS: dict[str, Callable[[Path, str, str, int], object]] = {
    "write": _write,
    "sparse": _sparse,
    "remove": _remove,
    "attribute": _attribute,
    "mkdir": lambda root, one, _, __: (root / one).mkdir(),
    "rename": lambda root, one, other, _: (root / one).rename(root / other),
    "link": lambda root, one, other, _: os.link(root / one, root / other, follow_symlinks=False),
    "symlink": lambda root, one, other, _: (root / one).symlink_to(other),
    "outward": lambda root, one, _, __: (root / one).symlink_to("/etc/passwd"),
    "fifo": lambda root, one, _, number: os.mkfifo(root / one, number % 0o777),
    "chmod": lambda root, one, _, number: (root / one).chmod(number % 0o7777),
    "chown": lambda root, one, _, number: os.lchown(root / one, number % 65_536, 7),
    "touch": lambda root, one, _, number: os.utime(root / one, ns=(number, number)),
}
# Mostly what is there, and places where something can come to be.
THERE = ["f", "a/f", "a/b/f", "b/a/f", "a/setuid", "link", "a", "b", "a/b", "b/a", "x", "a/x"]
FREE = ["x", "a/x", "b/x", "y", "a/b/x", "c d/x"]
ANY = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
SOURCES = st.sampled_from(THERE) | st.sampled_from(THERE) | ANY
TARGETS = st.sampled_from(FREE) | st.sampled_from(FREE) | ANY
OPERATIONS = st.one_of(
    st.tuples(
        st.sampled_from(sorted(ACTIONS)), SOURCES | TARGETS, TARGETS, st.integers(0, 1 << 16)
    ),
    st.tuples(st.sampled_from(["link", "rename"]), SOURCES, TARGETS, st.just(0)),
)


def _seen(root: Path) -> dict[str, tuple[object, ...]]:
    """All that makes a tree what it is, by name; files with several names by what they share."""
    found: dict[str, tuple[object, ...]] = {}
    names_of: dict[int, list[str]] = {}
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            relative = str(path.relative_to(root))
            if relative.split("/")[0] in MOUNT_POINTS:
                continue
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                names_of.setdefault(status.st_ino, []).append(relative)
            found[relative] = (
                oct(status.st_mode),
                (status.st_uid, status.st_gid),
                _content(path, status),
                {key: os.getxattr(path, key) for key in _user_attributes(path)},
                None if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns,
            )
    # Which names are one file is part of what was seen; links into the base are not.
    shared = sorted(tuple(sorted(names)) for names in names_of.values() if len(names) > 1)
    return {**found, "one file": tuple(shared)}


def _user_attributes(path: Path) -> list[str]:
    if path.is_symlink():
        return []
    return [name for name in os.listxattr(path) if name.startswith("user.")]


def _content(path: Path, status: os.stat_result) -> object:
    if stat.S_ISLNK(status.st_mode):
        return str(path.readlink())
    if stat.S_ISREG(status.st_mode):
        with path.open("rb") as file:
            return (status.st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return None


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(operations=st.lists(OPERATIONS, max_size=25))
def test_the_image_is_what_the_container_saw(disks: Disks, operations: list[Operation]) -> None:
    ground = Ground(disks.paths.root / "ground", disks)
    try:
        before = tree_digest(ground.base)
        act(ground.merged, operations)
        seen = _seen(ground.merged)
        kernel.umount(ground.merged)
        capture(ground.base, ground.upper, ground.output)
        assert _seen(ground.output) == seen
        assert tree_digest(ground.base) == before
    finally:
        ground.close()
