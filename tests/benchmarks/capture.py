"""What making an image of many small files takes, beside cp(1), tar(1) and sha256sum(1).

Files are written to a disk of their own, as a build's steps write them; then the image is made of
it as an assembly does, but for the container.  The peers do the same work on the same files:
``cp -a`` from that disk to the store's and ``tar | sha256sum`` of the copy.  ``cp -al`` is the
least a tree of so many names could cost.  Run it as root: ``python -m tests.benchmarks.capture``.

Times are of the clock and of the processor; the latter do not mind what else the machine does.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hostruntime.container.disk import Disks
from hostruntime.host import kernel
from hostruntime.host.paths import StatePaths, claim_instance, release_instance
from hostruntime.image.capture import capture
from hostruntime.image.contents import installed_packages
from hostruntime.image.digest import image_digest
from hostruntime.image.inode_record import write_inode_record
from hostruntime.image.scrub import RULES, scrub
from hostruntime.image.trees import inventory

DISK_MB = 20_480
# A step that writes nothing but files, each a little longer than the one before.
WRITER = """
import os, sys
count, root = int(sys.argv[1]), sys.argv[2]
for number in range(count):
    if number % 100 == 0:
        directory = f"{root}/srv/{number // 10000}/{number // 100}"
        os.makedirs(directory)
    with open(f"{directory}/{number}.js", "w") as file:
        file.write(f"module {number} " * (number % 300 + 1))
"""


@dataclass
class Clock:
    """Prints a row for each piece of work."""

    count: int
    rows: dict[str, float] = field(default_factory=dict)

    def time(self, name: str, work: Callable[[], object]) -> None:
        """Do it and say what it took."""
        began, computed = time.perf_counter(), processor_seconds()
        work()
        took, used = time.perf_counter() - began, processor_seconds() - computed
        self.rows[name] = took
        rate = self.count / max(took, 1e-9)
        sys.stdout.write(f"{name:<44}{took:>9.2f} s{used:>9.2f} s{rate:>12,.0f}\n")
        sys.stdout.flush()


def processor_seconds() -> float:
    """What this process and its children have computed so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def shell(command: str) -> None:
    """Run a peer."""
    subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)


def measure(root: Path, layer: Path, merged: Path, count: int) -> None:
    """Write the files, then both make something of them; the peer first, as caches help later."""
    clock, base, tree = Clock(count), root / "base", root / "tree"
    writer = [sys.executable, "-c", WRITER, str(count), str(merged)]
    sys.stdout.write(f"\n{f'{count:,} files':<44}{'clock':>11}{'processor':>11}{'files/s':>12}\n")
    clock.time("written by a step", lambda: subprocess.run(writer, check=True))
    kernel.umount(merged)
    copy, links = root / "copy", root / "links"
    clock.time("cp -a", lambda: shell(f"cp -a {layer} {copy}"))
    clock.time("tar c | sha256sum", lambda: shell(f"tar c -C {copy} . | sha256sum"))
    clock.time("cp -al", lambda: shell(f"cp -al {copy} {links}"))

    def make() -> None:
        known = capture(base, layer, tree).known
        scrub(tree, RULES)
        write_inode_record(root, None, inventory(tree))
        image_digest(tree, base, known=known)
        installed_packages(tree)

    clock.time("captured and described", make)
    clock.time("flushed to disk", lambda: kernel.syncfs(root))
    peers = clock.rows["cp -a"] + clock.rows["tar c | sha256sum"]
    for name, reference in (("the writing", clock.rows["written by a step"]), ("cp, tar", peers)):
        sys.stdout.write(f"  {clock.rows['captured and described'] / reference:.2f} of {name}\n")


def run(directory: Path, count: int) -> None:
    """Make what a build has, measure, and leave nothing."""
    root = Path(tempfile.mkdtemp(prefix="orkestr-bench-", dir=directory))
    paths = StatePaths(root / "state").ensure()
    disks = Disks(paths, claim_instance(paths))
    merged = root / "merged"
    try:
        disk = disks.attach("bench", DISK_MB)
        for path in (disk / "upper", disk / "work", root / "base", merged):
            path.mkdir()
        layers = f"lowerdir={root / 'base'},upperdir={disk / 'upper'},workdir={disk / 'work'}"
        kernel.mount("overlay", merged, "overlay", 0, layers)
        measure(root, disk / "upper", merged, count)
    finally:
        if merged.is_mount():
            kernel.umount(merged)
        disks.release("bench")
        shutil.rmtree(disks.mounts.parent, ignore_errors=True)
        release_instance(paths)
        shutil.rmtree(root)


def main(argv: Sequence[str]) -> int:
    """Measure for each number of files."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.capture")
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp"), help="where, on disk")
    options = parser.parse_args(argv)
    for count in options.files:
        run(options.directory, count)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
