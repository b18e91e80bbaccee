"""Every variable that is read is documented, and every one that is documented is read."""

from __future__ import annotations

import re
from pathlib import Path

from orkestr_console.runner.layout import TREE

ROOMS = ("hostruntime", "orkestr_console", "sandboxes_app", "templates_app")
NAME = re.compile(r"\bORKESTR_[A-Z][A-Z_]*[A-Z]\b")
# The SDK's own, which the console's pages show.
CLIENTS = {"ORKESTR_API_KEY", "ORKESTR_BASE_URL"}
# Not an operator's: the suite's, and what `up` tells its programs.
INTERNAL = {"ORKESTR_WORKERS", "ORKESTR_WORKER_STALE"}


def quoted(path: Path) -> set[str]:
    return set(re.findall(rf"[\"'$]{{?({NAME.pattern})[\"'}}:]", path.read_text()))


def test_the_table_of_variables_is_whole() -> None:
    sources = [path for room in ROOMS for path in (TREE / room).rglob("*") if path.is_file()]
    read = set().union(*(quoted(path) for path in sources if path.suffix in {".py", ".sh"}))
    table = (TREE / "orkestr_console/README.md").read_text()
    rows = set(re.findall(rf"^\| `({NAME.pattern})` \|", table, re.MULTILINE))
    assert read - CLIENTS - INTERNAL == rows
