"""Who may import whom: the one direction that shared design fixes, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
PACKAGES = ("hostruntime", "orkestr_console", "sandboxes_app", "templates_app")

# Lower may not import higher, within and across the apps.
LAYERS = {
    "errors": 0,
    "ids": 0,
    "models": 1,
    "specs": 1,
    "services": 2,
    "presenters": 3,
    "tasks": 3,
    "forms": 4,
    "views": 4,
    "api": 4,
    "consumers": 4,
    "urls": 5,
    "urls_api": 5,
    "asgi": 5,
}
HOST_CLIENT_USERS = {"services", "tasks"}


def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name, migrations left out."""
    return {
        ".".join(path.relative_to(TREE).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in sorted((TREE / package).rglob("*.py"))
        if "migrations" not in path.parts
    }


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, wherever in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively, which hides who imports whom"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int | None:
    """The layer of `app.module…`, or None for a module that stands outside the layering."""
    parts = name.split(".")
    for part in parts[1:3]:
        if part in LAYERS:
            return LAYERS[part]
    return None


@pytest.mark.parametrize("name", [m for m in modules() if within(m, "hostruntime")])
def test_the_host_runtime_imports_neither_django_nor_the_apps(name: str) -> None:
    barred = ("django", "channels", "django_q", *(p for p in PACKAGES if p != "hostruntime"))
    found = [i for i in imports(modules()[name]) if any(within(i, b) for b in barred)]
    assert found == []


def test_lxc_is_imported_by_containers_alone() -> None:
    users = {
        name
        for name, path in modules().items()
        if any(within(i, "lxc") or within(i, "_lxc") for i in imports(path))
    }
    assert users == {"hostruntime.containers"}


def test_programs_are_started_by_run_and_by_the_runner_alone() -> None:
    barred = ("subprocess", "os.system", "os.popen", "pty", "os.posix_spawn")
    users = {
        name
        for name, path in modules().items()
        if any(within(i, b) for i in imports(path) for b in barred)
    }
    assert {u for u in users if not within(u, "orkestr_console.runner")} <= {"hostruntime.run"}


def test_templates_never_import_sandboxes() -> None:
    found = {
        name
        for name, path in modules().items()
        if within(name, "templates_app") and any(within(i, "sandboxes_app") for i in imports(path))
    }
    assert found == set()


def test_only_services_and_tasks_call_the_host() -> None:
    """The runner may too: it starts the host agent, and knows no team, template or sandbox row."""
    calls = ("hostruntime.client", "hostruntime.errors")
    users = {
        name
        for name, path in modules().items()
        if not within(name, "hostruntime") and not within(name, "orkestr_console.runner")
        if any(within(i, c) for i in imports(path) for c in calls)
    }
    strangers = {u for u in users if not HOST_CLIENT_USERS & set(u.split("."))}
    assert strangers == set()


@pytest.mark.parametrize(
    "name", [m for m in modules() if within(m, "templates_app") or within(m, "sandboxes_app")]
)
def test_an_app_imports_downwards_only(name: str) -> None:
    own = layer(name)
    if own is None:
        return
    found = [
        imported
        for imported in imports(modules()[name])
        if any(within(imported, package) for package in PACKAGES[1:])
        if (other := layer(imported)) is not None and other > own
    ]
    assert found == []
