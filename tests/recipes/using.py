"""Building a recipe and using what it installed."""

from __future__ import annotations

from tests.clients.making import Sandboxes, Templates
from tests.recipes.table import Recipe


def assert_works(recipe: Recipe, templates: Templates, sandboxes: Sandboxes) -> None:
    """Make its template, restricted, and run its checks in one sandbox with no network."""
    template = templates.ready(recipe.base, *recipe.steps)
    sandbox = sandboxes.boot(template, network="off")
    for check in recipe.checks:
        done = sandbox.exec(check)
        assert done.exit_code == 0, f"{check}\n{done.stdout}\n{done.stderr}"
