"""Whatever the documents name in backquotes, or link to, exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.test_imports import TREE, modules

# The documents for developers, in which every backquoted path and name is the repository's own.
DEVELOPERS = ("ARCHITECTURE.md", "CONTRIBUTING.md")
DOCUMENTS = (
    *DEVELOPERS,
    *("README.md", "SECURITY.md", "CHANGELOG.md"),
    *(f"{folder}/README.md" for folder in ("hostruntime", "orkestr_console")),
    *(f"{folder}/README.md" for folder in ("templates_app", "sandboxes_app")),
)
# Where a path may begin: the documents leave out the package that they are speaking of.
ROOTS = (TREE, TREE / "hostruntime", TREE / "orkestr_console")
PACKAGES = {"hostruntime", "orkestr_console", "templates_app", "sandboxes_app", "tests"}
# Created by bootstrap.sh, or forbidden.
NOT_IN_THE_TREE = {".venv", ".venv-other", ".venv/bin/python", "utils.py"}

CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)")
PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*/?")
FILE = re.compile(r".+\.(?:py|md|sh|html|toml|txt|json|css|js)")
NAME = re.compile(r"[a-z_]\w*(?:\.\w+)+")


def words(document: str) -> list[str]:
    """The words in a document's backquotes, in order."""
    text = (TREE / document).read_text()
    return [word for code in CODE.findall(text) for word in re.split(r"[\s,]+", code)]


def is_path(word: str) -> bool:
    return bool(PATH.fullmatch(word)) and ("/" in word or bool(FILE.fullmatch(word)))


def path_exists(word: str) -> bool:
    """Whether a path is there, below a root; a file's bare name may be anywhere."""
    if any((root / word).exists() for root in ROOTS):
        return True
    return "/" not in word and any(path.name == word for path in modules().values())


@cache
def defined(path: Path) -> frozenset[str]:
    """The names that a module defines at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


def name_exists(word: str) -> bool:
    """Whether ``package.module``, ``package.module.name`` or ``module.name`` is there."""
    parts = word.split(".")
    if parts[0] in PACKAGES:
        place = TREE.joinpath(*parts)
        if place.is_dir() or place.with_suffix(".py").exists():
            return True
    *where, name = parts
    suffix = "." + ".".join(where)
    return any(
        f".{module}".endswith(suffix) and name in defined(path)
        for module, path in modules().items()
    )


def test_what_is_in_backquotes_exists() -> None:
    found = {word for document in DEVELOPERS for word in words(document)} - NOT_IN_THE_TREE
    paths = {word for word in found if is_path(word)}
    names = {word for word in found - paths if NAME.fullmatch(word)}
    assert len(paths) > 30
    assert {word for word in paths if not path_exists(word)} == set()
    assert "tasks.in_thread" in names
    assert {word for word in names if not name_exists(word)} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_link_leads_somewhere(document: str) -> None:
    directory = (TREE / document).parent
    links = LINK.findall((TREE / document).read_text())
    local = [link for link in links if not link.startswith(("http:", "https:"))]
    assert [link for link in local if not (directory / link).exists()] == []


@pytest.mark.parametrize(
    ("word", "exists"),
    [
        ("core/hosts.py", True),
        ("core/host.py", False),
        ("wire/", True),
        ("wires/", False),
        ("urls_api.py", True),
        ("urls_apis.py", False),
    ],
)
def test_a_path_is_looked_for_where_it_may_begin(word: str, exists: bool) -> None:
    assert is_path(word)
    assert path_exists(word) is exists


@pytest.mark.parametrize(
    ("word", "exists"),
    [
        ("tasks.KeyedLocks", True),
        ("tasks.KeyedLock", False),
        ("tests.verify", True),
        ("tests.verified", False),
        ("hostruntime.host.tasks.every", True),
    ],
)
def test_a_name_is_looked_for_in_its_module(word: str, exists: bool) -> None:
    assert name_exists(word) is exists
