"""Base images made here, by the product itself, so that no emulated machine has to.

One state directory per version of `hostruntime/` in Git: what an agent of that version made is
used by every commit that has the same one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostruntime.errors import HostUnavailable
from hostruntime.host.run import run
from tests.host.client import HostClient
from tests.vm.places import TREE, Places, VmError

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0
_QUICK = 120.0


def base_images(places: Places, commit: str, say: Callable[[str], None]) -> Path:
    """An image store with every base, made now unless it is there already.

    Raises VmError, HostError.
    """
    version = git("rev-parse", f"{commit}:hostruntime")
    state = places.bases / version[:16]
    complete = state / "complete"
    if not complete.exists():
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _checkout(state, commit) as tree, _agent(tree, state) as host:
            for base in host.bases():
                if base.on_request:
                    continue
                say(f"making base {base.name}")
                for event in host.ensure_base(base.name):
                    if event.message:
                        say(event.message)
        complete.touch()
        _forget_others(places, state)
    return state / "images"


def git(*arguments: str) -> str:
    """What git says of this tree. Raises CommandFailed."""
    return run(["git", "-C", str(TREE), *arguments], timeout=_QUICK).text.strip()


@contextmanager
def _checkout(state: Path, commit: str) -> Iterator[Path]:
    """The commit's files, without what is changed in this tree and not committed."""
    tree = state / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    archive = state / "tree.tar"
    try:
        run(
            ["git", "-C", str(TREE), "archive", "-o", str(archive), commit, "hostruntime"],
            timeout=_QUICK,
        )
        run(["tar", "-xf", str(archive), "-C", str(tree)], timeout=_QUICK)
        yield tree
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(tree)


@contextmanager
def _agent(tree: Path, state: Path) -> Iterator[HostClient]:
    """That tree's agent on the state directory; nothing of it is on this machine afterwards."""
    socket = state / "sock"
    command = [sys.executable, "-m", "hostruntime.agent"]
    command += ["--state-dir", str(state), "--socket", str(socket)]
    log = state / "agent.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, cwd=tree, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink
        )
    try:
        with HostClient(socket) as host:
            _await(host, process, log)
            yield host
    finally:
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        finally:
            process.kill()
            process.wait()
            subprocess.run([*command, "teardown"], cwd=tree, check=True, timeout=_QUICK)


def _await(host: HostClient, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            host.health()
        except HostUnavailable:
            if process.poll() is not None or time.monotonic() > deadline:
                raise VmError(
                    f"the agent here does not serve:\n{log.read_text()[-2000:]}"
                ) from None
            time.sleep(0.1)
        else:
            return


def _forget_others(places: Places, state: Path) -> None:
    for other in places.bases.iterdir():
        if other != state:
            shutil.rmtree(other)
