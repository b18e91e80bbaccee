"""Who may import whom: the one direction that shared design fixes, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
PACKAGES = ("hostruntime", "orkestr_console", "sandboxes_app", "templates_app")

APPS = ("templates_app.", "sandboxes_app.")

# The folders in floor order: a module imports from its own floor and from those before it.
FLOORS = (
    "hostruntime",
    "hostruntime.errors",
    "hostruntime.wire",
    "hostruntime.host",
    "hostruntime.client",
    "hostruntime.image",
    "hostruntime.network",
    "hostruntime.container",
    "hostruntime.build",
    "hostruntime.volume",
    "hostruntime.sandbox",
    "hostruntime.backup",
    "hostruntime.agent",
    "orkestr_console",
    "orkestr_console.core",
    "orkestr_console.settings",
    "orkestr_console.queue",
    "orkestr_console.accounts",
    "orkestr_console.installation",
    "orkestr_console.http",
    "orkestr_console.openapi",
    "orkestr_console.webhooks",
    "orkestr_console.ui",
    "templates_app",
    "sandboxes_app",
    "orkestr_console.console",
    "orkestr_console.mcp",
    "orkestr_console.previews",
    "orkestr_console.urls",
    "orkestr_console.asgi",
    "orkestr_console.runner",
)

# Within an app, lower may not import higher either.
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
HOST_CLIENT_USERS = {"services", "tasks", "hosts", "readiness"}


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


def floor(name: str) -> str:
    """The folder that a module is of, the innermost."""
    return max((one for one in FLOORS if within(name, one)), key=len)


@pytest.mark.parametrize("name", modules())
def test_a_floor_stands_on_those_below(name: str) -> None:
    own = FLOORS.index(floor(name))
    of_ours = [one for one in imports(modules()[name]) if one.partition(".")[0] in PACKAGES]
    found = {one for one in of_ours if FLOORS.index(floor(one)) > own}
    assert found == set()


def test_every_folder_is_a_floor() -> None:
    folders = {".".join(name.split(".")[:2]) for name in modules() if name.count(".") > 1}
    apps = {
        name for name in folders if name.partition(".")[0] in {"templates_app", "sandboxes_app"}
    }
    assert folders - apps <= set(FLOORS)


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
    assert users == {"hostruntime.container.lxc"}


def test_programs_are_started_by_run_and_by_the_runner_alone() -> None:
    """And LXC's, by the launcher, which is forked for each command and imports next to nothing."""
    barred = ("subprocess", "os.system", "os.popen", "pty", "os.posix_spawn")
    users = {
        name
        for name, path in modules().items()
        if any(within(i, b) for i in imports(path) for b in barred)
    }
    known = {"hostruntime.host.run", "hostruntime.container.lxc_start"}
    # What runs in a sandbox, on the Python there.
    known |= {"hostruntime.container.inside_bridge", "hostruntime.build.bases.javascript.kernel"}
    assert {u for u in users if not within(u, "orkestr_console.runner")} <= known


def test_templates_never_import_sandboxes() -> None:
    found = {
        name
        for name, path in modules().items()
        if within(name, "templates_app") and any(within(i, "sandboxes_app") for i in imports(path))
    }
    assert found == set()


def test_only_services_and_tasks_call_the_host() -> None:
    """The runner may too: it starts the host agent, and knows no team, template or sandbox row."""
    calls = ("hostruntime.client.host_client", "hostruntime.errors")
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
