"""A host agent on a state directory of its own, whose images take no minute to make."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from hostruntime.host.paths import StatePaths
from hostruntime.image.store import ImageManifest, ImageStore
from tests.host.agent import Agent
from tests.host.smalltree import make_small_tree

IMAGE = "img_small"


def publish(
    state: Path, image: str = IMAGE, kind: Literal["base", "template"] = "template"
) -> Path:
    """Put an image into the store of a state directory; where it is then."""
    store = ImageStore(StatePaths(state).ensure())
    staged = store.create_staging(image)
    make_small_tree(staged / "tree")
    manifest = ImageManifest(
        id=image,
        kind=kind,
        base=None,
        created_at=time.time() - 86_400,
        size_bytes=50_000_000,
        file_count=1000,
        shared_bytes=0,
    )
    return store.publish(staged, manifest).tree.parent


@contextmanager
def a_small_agent(state: Path, *images: str, umask: int = -1) -> Iterator[Agent]:
    """Run an agent on ``state``; afterwards nothing of it is left, the directory included."""
    for image in images or (IMAGE,):
        publish(state, image)
    agent = Agent(state, umask=umask)
    try:
        agent.start()
        yield agent
    finally:
        agent.tear_down()
        shutil.rmtree(state)
