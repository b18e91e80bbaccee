"""No function is longer than a screen, and no module than can be kept in one's head."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.test_imports import modules

MAX_LINES = 600
MAX_FUNCTION_LINES = 40


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """The name and the number of lines of every function in a file, decorators left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_module_is_too_long() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    long = {
        f"{name}.{function}"
        for name, path in modules().items()
        for function, lines in functions(path)
        if lines > MAX_FUNCTION_LINES
    }
    assert long == set()
