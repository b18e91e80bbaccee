"""Taking down what runs on a state directory that somebody has deleted.

What an agent has on the host is named after its instance number, and which directory has which
number is also known outside of it (:func:`hostruntime.host.paths.claim_instance`).  So all of it is
found and removed without the directory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hostruntime.errors import HostUnavailable
from hostruntime.host.paths import StatePaths, is_claimed

_OPTION = "--state-dir"


@contextmanager
def present(paths: StatePaths) -> Iterator[bool]:
    """Whether there is something to take down; the state directory exists in the block if so.

    One that has been deleted is created for the block, and deleted again if that succeeds.  Raises
    HostUnavailable if its agent still runs, OSError.
    """
    if paths.root.is_dir() or not is_claimed(paths):
        yield paths.root.is_dir()
        return
    if pids := _agents(paths.root):
        raise HostUnavailable(
            f"A host agent still runs on {paths.root}, which has been deleted or moved. Stop it "
            f"first, with `kill {' '.join(map(str, pids))}`, and run this again."
        )
    missing = [path for path in (paths.root, *paths.root.parents) if not path.exists()]
    paths.root.mkdir(mode=0o700, parents=True)
    yield True
    shutil.rmtree(paths.root)
    for parent in missing[1:]:
        with suppress(OSError):
            parent.rmdir()


def _agents(root: Path) -> list[int]:
    """The processes that were started to serve this directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
            if _OPTION not in words[:-1] or "teardown" in words:
                continue
            given = Path(words[words.index(_OPTION) + 1])
            if (entry / "cwd").readlink().joinpath(given) == root:
                found.append(int(entry.name))
    return found
