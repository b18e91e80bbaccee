"""Each page's styles as one file and its scripts as one file, made when static files are collected.

The sources under ``static/`` stay small and apart; browsers get ``console.css`` and ``console.js``.
The script has htmx first, then the modules in the order of their imports. Each module becomes a
function that is called at once, so its names stay its own; only the forms of ``import`` and
``export`` below are understood, and anything else is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.staticfiles.finders import BaseFinder
from django.core.files.base import ContentFile
from django.core.files.storage import InMemoryStorage

STYLES = "css"
SCRIPTS = "js"
VENDOR = "vendor"
ENTRY = "console"

IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export ((?:async )?function (\w+))", re.MULTILINE)
# What is left of either would end up in the middle of a function.
LEFT_OVER = re.compile(r"^(?:import|export)\b.*", re.MULTILINE)


def bundle_styles(root: Path) -> str:
    """All style sheets in the order of their names."""
    return "\n".join(path.read_text() for path in sorted((root / STYLES).glob("*.css")))


def bundle_scripts(root: Path) -> str:
    """htmx and the modules that the entry module needs. Raises ``ValueError``."""
    library = "\n".join(path.read_text() for path in sorted((root / VENDOR).glob("*.js")))
    modules = ordered(root / SCRIPTS, ENTRY)
    return "\n".join([f"{library};", *(as_function(*module) for module in modules.items())])


def ordered(folder: Path, entry: str) -> dict[str, str]:
    """A module and all that it imports, by name, each after those that it imports."""
    found: dict[str, str] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ValueError(f"{' → '.join((*above, name))}.js import each other")
        if name not in found:
            source = (folder / f"{name}.js").read_text()
            for match in IMPORT.finditer(source):
                visit(match[2], (*above, name))
            found[name] = source

    visit(entry, ())
    return found


def as_function(name: str, source: str) -> str:
    """A module as a constant of its exports: ``const log = (() => {…})();``."""
    exports = ", ".join(match[2] for match in EXPORT.finditer(source))
    body = IMPORT.sub(r"const { \1 } = \2_js;\n", source)
    body = EXPORT.sub(r"\1", body)
    if left := LEFT_OVER.search(body):
        raise ValueError(f"{name}.js has a form of module that is not understood: {left[0]}")
    return f'const {name}_js = (() => {{\n"use strict";\n{body}return {{ {exports} }};\n}})();'


BUNDLES: Mapping[str, Callable[[Path], str]] = {
    f"{ENTRY}.css": bundle_styles,
    f"{ENTRY}.js": bundle_scripts,
}


class BundleFinder(BaseFinder):
    """Offers the bundles to ``collectstatic``, as if they were files."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._root = Path(settings.BASE_DIR) / "static"

    def list(self, ignore_patterns: Any) -> Iterator[tuple[str, Any]]:
        """The bundles, and where their contents are."""
        storage = InMemoryStorage()
        for name, bundle in BUNDLES.items():
            storage.save(name, ContentFile(bundle(self._root).encode()))
            yield name, storage

    def find(self, path: str, find_all: bool = False) -> Any:
        """No path: bundles are served only once they have been collected."""
        return [] if find_all else None
