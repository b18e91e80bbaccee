"""What a build's steps leave where nothing is captured: /workspace and /tmp, which are memory.

A step that installs there succeeds, and a sandbox has nothing of it.  So it is told once, when the
last step has ended, of what is there then: a step may well leave there what a later one takes away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from hostruntime.build.plan import Emit
from hostruntime.container.manager import ContainerManager
from hostruntime.errors import HostError

DIRECTORIES = ("/workspace", "/tmp")
MOST_NAMED = 5
# What programs leave in /tmp for themselves: mktemp(1), Python's tempfile, the JVM, Node, X.
_OWN_RUBBISH = re.compile(
    r"tmp[._]?[A-Za-z0-9_]{6,12}|hsperfdata_.*|node-compile-cache|v8-compile-cache.*|\..*-unix"
)


class Uncaptured:
    """What is left there by which step, of one build."""

    def __init__(self, containers: ContainerManager, owner: str) -> None:
        self._containers = containers
        self._owner = owner
        self._left_by: dict[str, int] = {}

    def take_up(self, left: Sequence[Sequence[str]]) -> None:
        """The build begins behind steps that are not run again; what each of them had left."""
        for number, paths in enumerate(left, 1):
            self._left_by |= dict.fromkeys(paths, number)

    async def look(self, step: int) -> tuple[str, ...]:
        """The step has ended: what is there now and was not before is its own, and returned."""
        own: list[str] = []
        for directory in DIRECTORIES:
            try:
                names = await self._containers.list_directory(self._owner, directory)
            except HostError:
                # Too many to be listed, or out of memory: nothing that a build should end for.
                continue
            paths = {f"{directory}/{name}" for name in names if not _OWN_RUBBISH.fullmatch(name)}
            known = {path for path in self._left_by if path.startswith(f"{directory}/")}
            for path in known - paths:
                del self._left_by[path]
            fresh = sorted(paths - known)
            self._left_by |= dict.fromkeys(fresh, step)
            own += fresh
        return tuple(own)

    def tell(self, emit: Emit) -> None:
        """One event for each step that left something which is there still."""
        by_step: dict[int, list[str]] = defaultdict(list)
        for path, step in self._left_by.items():
            by_step[step].append(path)
        for step, paths in sorted(by_step.items()):
            emit(
                "not_captured",
                step=step,
                paths=sorted(paths)[:MOST_NAMED],
                count=len(paths),
                message=_sentence(sorted(paths)),
            )


def _sentence(paths: list[str]) -> str:
    named = ", ".join(paths[:MOST_NAMED])
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return (
        f"This step left {named}{more}. /workspace and /tmp are memory: nothing in them is in the "
        "image. Put files that sandboxes need into another directory, such as /opt or /root."
    )
