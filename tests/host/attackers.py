"""The image that attacks run in, and running a program of them in a sandbox."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hostruntime.host.paths import StatePaths
from hostruntime.host.run import run
from hostruntime.image.store import ImageManifest, ImageStore
from hostruntime.wire.commands import Exec
from tests.host.agent import REPO, Agent
from tests.host.attacks.harness import Outcome
from tests.host.client import HostClient
from tests.host.smalltree import PYTHON

PROGRAMS = "tests/host/attacks"
PLACE = "/opt/attacks"
HELPER = "usr/local/lib/preload.so"
_SKIPPED = shutil.ignore_patterns(
    "__pycache__", "test", "tests", "dist-packages", "config-*", "*.a"
)
# Loaded into a process it leaves a line: its pid, its program, and how opening that for writing
# was refused (errno).
_PRELOADED = r"""
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
__attribute__((constructor)) static void mark(void) {
    char exe[4096] = "?", line[4200];
    ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (n > 0) exe[n] = 0;
    int own = open("/proc/self/exe", O_WRONLY);
    int refused = own < 0 ? errno : 0;
    int fd = open("/workspace/preloaded", O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (fd >= 0) {
        n = snprintf(line, sizeof line, "%d %s %d\n", getpid(), exe, refused);
        if (write(fd, line, n)) {}
        close(fd);
    }
}
"""


@contextmanager
def attackers_image(agent: Agent, base: str) -> Iterator[str]:
    """An image that is the base with the host's Debian Python and the attacks; gone afterwards."""
    paths = StatePaths(agent.state)
    store = ImageStore(paths)
    name = f"img_attacks{time.time_ns():x}"
    staged = store.create_staging(name)
    # Hard links, so nothing below may be opened for writing: files are only ever added.
    run(["cp", "-al", str(store.get(base).tree), str(staged / "tree")], timeout=60)
    _add_python(staged / "tree")
    _add_programs(staged / "tree")
    store.publish(staged, ImageManifest(name, "template", base, time.time(), 0, 0, 0))
    try:
        yield name
    finally:
        agent.client.delete_image(name)


def _add_python(root: Path) -> None:
    binary = Path(PYTHON).resolve()
    library = Path(f"/usr/lib/{binary.name}")
    _add(binary, root / "usr/bin/python3")
    shutil.copytree(library, root / "usr/lib" / binary.name, ignore=_SKIPPED)
    extensions = [str(path) for path in (library / "lib-dynload").glob("*.so")]
    listed = run(["ldd", str(binary), *extensions], timeout=30).text
    for needed in set(re.findall(r"(/\S+\.so\S*) \(", listed)):
        target = root / "usr" / needed.lstrip("/").removeprefix("usr/")
        # The host's release may be newer than the base's: its C library serves the base's programs
        # too (symbol versions), and the base's does not serve the host's Python.
        target.unlink(missing_ok=True)
        _add(Path(needed).resolve(), target)


def _add_programs(root: Path) -> None:
    for path in [*(REPO / PROGRAMS).glob("*.py"), REPO / "tests/host/__init__.py"]:
        _add(path, root / PLACE.lstrip("/") / path.relative_to(REPO))
    (root / PLACE.lstrip("/") / "tests/__init__.py").touch()
    library = root / HELPER
    library.parent.mkdir(parents=True, exist_ok=True)
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", str(library)]
    subprocess.run(compiler, input=_PRELOADED.encode(), check=True, timeout=30)


def _add(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(source, target)


def outcomes(
    host: HostClient, sandbox: str, program: str, env: Mapping[str, str] | None = None
) -> dict[str, Outcome]:
    """Run a program of attacks in a sandbox to its end; what came of each, by name."""
    argv = ["python3", "-m", f"tests.host.attacks.{program}"]
    environment = {"PYTHONPATH": PLACE, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})}
    result = host.exec(sandbox, Exec(argv, env=environment, timeout_seconds=60))
    lines = result.stdout.decode().splitlines()
    assert lines[-1:] == ["done"], result.stderr.decode()[-3000:]
    found = [Outcome.parse(line) for line in lines[:-1]]
    return {outcome.name: outcome for outcome in found}
