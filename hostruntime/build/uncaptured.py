"""Files that steps leave in uncaptured directories: /workspace and /tmp, which are tmpfs.

A step that installs something there succeeds, but a sandbox won't have it. What remains there is
reported after the last step, because a step may leave files there that a later one removes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from hostruntime.build.plan import Emit

DIRECTORIES = ("/workspace", "/tmp")
MAX_NAMED = 5
# Temporary files of programs: mktemp(1), Python's tempfile, the JVM, Node, X.
_TEMPORARY_NAMES = re.compile(
    r"tmp[._]?[A-Za-z0-9_]{6,12}|hsperfdata_.*|node-compile-cache|v8-compile-cache.*|\..*-unix"
)


class UncapturedFiles:
    """Tracks which step of a build left which files there."""

    def __init__(self) -> None:
        self._step_by_path: dict[str, int] = {}

    def resume(self, left_by_step: Sequence[Sequence[str]]) -> None:
        """Start with what each of the reused steps had left."""
        for number, paths in enumerate(left_by_step, 1):
            self._step_by_path |= dict.fromkeys(paths, number)

    def update(self, step: int, listings: Sequence[Collection[str] | None]) -> tuple[str, ...]:
        """Return the files that are new since the last call, and attribute them to ``step``.

        ``listings`` has the names in each of the :data:`DIRECTORIES`, None where they are unknown.
        """
        new: list[str] = []
        for directory, names in zip(DIRECTORIES, listings, strict=False):
            if names is None:
                continue
            paths = {
                f"{directory}/{name}" for name in names if not _TEMPORARY_NAMES.fullmatch(name)
            }
            known = {path for path in self._step_by_path if path.startswith(f"{directory}/")}
            for path in known - paths:
                del self._step_by_path[path]
            fresh = sorted(paths - known)
            self._step_by_path |= dict.fromkeys(fresh, step)
            new += fresh
        return tuple(new)

    def report(self, emit: Emit) -> None:
        """Emit an event for each step that left files that still exist."""
        by_step: dict[int, list[str]] = defaultdict(list)
        for path, step in self._step_by_path.items():
            by_step[step].append(path)
        for step, paths in sorted(by_step.items()):
            emit(
                "not_captured",
                step=step,
                paths=sorted(paths)[:MAX_NAMED],
                count=len(paths),
                message=_message(sorted(paths)),
            )


def _message(paths: list[str]) -> str:
    named = ", ".join(paths[:MAX_NAMED])
    more = f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else ""
    return (
        f"This step left {named}{more}. /workspace and /tmp are memory: nothing in them is in the "
        "image. Put files that sandboxes need into another directory, such as /opt or /root."
    )
