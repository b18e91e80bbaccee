"""Making and describing small trees in tests."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

WHITEOUT = object()


def grow(root: Path, files: Mapping[str, str | None]) -> Path:
    """Make ``root`` with these files; a name that ends in a slash, or None, is a directory."""
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = root / name
        if text is None or name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def whiteout(path: Path) -> None:
    """What overlayfs leaves where something of the lower layer was removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | 0o000, os.makedev(0, 0))


def shape(root: Path) -> dict[str, str]:
    """Every name below ``root``: a directory as "/", a symlink as "-> target", a file's text."""
    found: dict[str, str] = {}
    for directory, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(directory, name)
            found[str(path.relative_to(root))] = _looks(path)
    return found


def _looks(path: Path) -> str:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return f"-> {path.readlink()}"
    if stat.S_ISDIR(mode):
        return "/"
    return path.read_text() if stat.S_ISREG(mode) else f"special {stat.S_IFMT(mode):o}"
