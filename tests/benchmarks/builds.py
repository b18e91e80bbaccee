"""What a build takes beyond its own steps, and beside the same commands in a plain chroot(1).

The chroot is a copy of the base's tree with the files of the runtime layer for network ``open`` in
it, so that pip asks the same index.  It has no container, no limits, no capture and no image.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hostruntime.container.rootfs import DEVICES
from hostruntime.host.paths import StatePaths
from hostruntime.image.store import ImageStore
from tests.benchmarks.report import Report
from tests.clients.making import Templates
from tests.stack import Stack

SMALL, SMALL_RECIPE = "debian-12", ("true", "echo done > /root/done")
LARGE, LARGE_RECIPE = "python-3.12-bare", ("pip install --no-cache-dir pandas numpy pyarrow",)
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
_POLL_SECONDS = 0.01
_BUILD_SECONDS = 900


def measure_builds(stack: Stack, report: Report, rounds: int) -> None:
    """A build that does nothing, and one that installs packages, beside a chroot."""
    with stack.client() as client:
        templates = Templates(client, build_seconds=_BUILD_SECONDS)
        try:
            beyond = [beyond_its_steps(templates) for _ in range(rounds)]
            report.table("A build of two steps: its time beyond theirs", {"build": beyond})
            times: dict[str, list[float]] = {"plain chroot": [], "build": []}
            for _ in range(max(rounds // 10, 2)):
                times["plain chroot"].append(in_chroot(stack, LARGE, LARGE_RECIPE))
                times["build"].append(build(templates, LARGE, LARGE_RECIPE)[0])
            report.table(f"`{LARGE_RECIPE[0]}`", times)
        finally:
            templates.delete_all()


def beyond_its_steps(templates: Templates) -> float:
    """The milliseconds from the request to the ready template that no step took."""
    total, template = build(templates, SMALL, SMALL_RECIPE)
    finished = (event for event in templates.events(template) if event["kind"] == "step_finished")
    return total - sum(float(event["duration_ms"]) for event in finished)


def build(templates: Templates, base: str, recipe: tuple[str, ...]) -> tuple[float, str]:
    """Milliseconds until a template is ready, and its id."""
    began = time.perf_counter()
    template = templates.create(base, *recipe, network="open")
    while (record := templates.get(template))["status"] == "building":
        time.sleep(_POLL_SECONDS)
    took = (time.perf_counter() - began) * 1000
    assert record["status"] == "ready", record
    return took, template


def in_chroot(stack: Stack, base: str, recipe: tuple[str, ...]) -> float:
    """Milliseconds that the same commands take in a copy of the base's tree."""
    with chroot_of(StatePaths(stack.layout.state_dir), base) as root:
        began = time.perf_counter()
        for command in recipe:
            run_in(root, command, ENVIRONMENT)
        return (time.perf_counter() - began) * 1000


@contextmanager
def chroot_of(paths: StatePaths, base: str) -> Iterator[Path]:
    """A copy of a base's tree on the same file system; it is gone after the block."""
    directory = Path(tempfile.mkdtemp(prefix="orkestr-chroot-", dir=paths.root))
    root = directory / "root"
    try:
        for tree in (ImageStore(paths).get(base).tree, paths.runtime / "open"):
            subprocess.run(["cp", "-a", f"{tree}/.", str(root)], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        for name, numbers in DEVICES.items():
            os.mknod(root / "dev" / name, stat.S_IFCHR | 0o666, os.makedev(*numbers))
        yield root
    finally:
        shutil.rmtree(directory)


def run_in(root: Path, command: str, environment: Mapping[str, str]) -> None:
    """Run a shell command in a chroot."""
    argv = [str(shutil.which("chroot")), str(root), "/bin/sh", "-ec", command]
    done = subprocess.run(argv, env=dict(environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
