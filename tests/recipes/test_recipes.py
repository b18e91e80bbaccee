"""Every recipe of the tables, built restricted and used without a network: `make recipes`."""

from __future__ import annotations

import pytest

from tests.clients.making import Sandboxes, Templates
from tests.recipes.stacks import STACKS, Stack
from tests.recipes.table import RECIPES, Recipe
from tests.recipes.using import assert_serves, assert_works


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_works_after_the_capture(
    recipe: Recipe, templates: Templates, sandboxes: Sandboxes
) -> None:
    assert_works(recipe, templates, sandboxes)


@pytest.mark.parametrize("made", STACKS, ids=lambda made: made.name)
def test_it_serves_without_a_network(
    made: Stack, templates: Templates, sandboxes: Sandboxes
) -> None:
    assert_serves(made, templates, sandboxes)
