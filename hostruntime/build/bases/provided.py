"""What a base's layer is given before its recipe runs: its own files, and another's Node.js."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

_PREFIX = Path("usr/local")
# Without the headers, which are larger than everything else together with npm.
_NODE_PROGRAMS = ("bin/node", "bin/npm", "bin/npx")
_NODE_PACKAGES = "lib/node_modules/npm"


def copy_node(tree: Path, layer: Path) -> None:
    """Copy Node.js and npm from an image's tree to a layer; blocks.  Raises OSError."""
    source, target = tree / _PREFIX, layer / _PREFIX
    for name in _NODE_PROGRAMS:
        _make_directory(layer, (target / name).parent)
        # npm and npx are links to programs below its packages.
        shutil.copy2(source / name, target / name, follow_symlinks=False)
    _make_directory(layer, (target / _NODE_PACKAGES).parent)
    shutil.copytree(source / _NODE_PACKAGES, target / _NODE_PACKAGES, symlinks=True)


def write_files(files: Iterable[tuple[str, int, str]], layer: Path) -> None:
    """Write files (path, mode, text) to a layer; blocks.  Raises OSError."""
    for name, mode, text in files:
        _make_directory(layer, (layer / name).parent)
        (layer / name).write_text(text)
        (layer / name).chmod(mode)


def _make_directory(layer: Path, directory: Path) -> None:
    """Create a directory, and those above it up to the layer, as everybody may read them.

    Whatever the agent's umask is.
    """
    missing = [
        parent
        for parent in (directory, *directory.parents)
        if parent.is_relative_to(layer) and not parent.exists()
    ]
    for parent in reversed(missing):
        parent.mkdir()
        parent.chmod(0o755)
