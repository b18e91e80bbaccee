"""Base images that the live installation has made, for tests that only want them to be there.

Each takes its minute or two, and the installation makes them all: that is part of what it proves.
``ORKESTR_TEST_BASES`` names the state directory that they are left in, if there is one.
"""

from __future__ import annotations

import os
from pathlib import Path

from hostruntime.errors import ImageNotFound
from hostruntime.host.paths import StatePaths
from hostruntime.host.run import run
from hostruntime.image.store import ImageStore

# Beside debian-12, which each makes for itself.
NAMES = ("python-3.12-bare", "node-22")


def save_bases(state: Path) -> None:
    """Copy what there is in a state directory to where others look; nothing if nobody does."""
    for name in NAMES:
        _copy(name, state, _cache_directory())


def restore_bases(state: Path) -> None:
    """Copy what has been left to a state directory that lacks it, be there an agent or not."""
    for name in NAMES:
        _copy(name, _cache_directory(), state)


def _cache_directory() -> Path | None:
    named = os.environ.get("ORKESTR_TEST_BASES")
    return Path(named) if named else None


def _copy(name: str, origin: Path | None, state: Path | None) -> None:
    if origin is None or state is None or not origin.exists():
        return
    store = ImageStore(StatePaths(state).ensure())
    if store.exists(name):
        return
    try:
        image = ImageStore(StatePaths(origin)).get(name)
    except ImageNotFound:
        return
    staged = store.create_staging(name)
    # Copied and not linked: nobody else links to an image's files (hostruntime.image.inode_record).
    run(["cp", "-a", "--reflink=auto", str(image.tree), str(staged / "tree")], timeout=120)
    store.publish(staged, image.manifest)
