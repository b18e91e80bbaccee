"""Building a recipe and using what it installed."""

from __future__ import annotations

from tests.clients.making import Sandboxes, Templates
from tests.recipes.stacks import Stack
from tests.recipes.table import Recipe

USE_SECONDS = 600


def assert_works(recipe: Recipe, templates: Templates, sandboxes: Sandboxes) -> None:
    """Make its template, restricted, and run its checks in one sandbox with no network."""
    template = templates.ready(recipe.base, *recipe.steps)
    sandbox = sandboxes.boot(template, network="off")
    for check in recipe.checks:
        done = sandbox.exec(check)
        assert done.exit_code == 0, f"{check}\n{done.stdout}\n{done.stderr}"


def assert_serves(stack: Stack, templates: Templates, sandboxes: Sandboxes) -> None:
    """Make its template, restricted, and use it in one sandbox with no network."""
    template = templates.ready(stack.base, *stack.steps)
    sandbox = sandboxes.boot(template, network="off", timeout_seconds=2 * USE_SECONDS)
    for command, says in stack.uses:
        done = sandbox.exec(command, timeout_seconds=USE_SECONDS)
        assert (done.exit_code, says in done.stdout) == (0, True), (
            f"{command}\nsays not {says!r}, but\n{done.stdout}\n{done.stderr}"
        )
