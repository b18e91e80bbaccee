"""Programs work after the capture as they did in the build; `make recipes` tries all of them."""

from __future__ import annotations

import pytest

from tests.clients.making import Sandboxes, Templates
from tests.recipes.table import RECIPES, Recipe
from tests.recipes.using import assert_works

QUICK = [recipe for recipe in RECIPES if recipe.quick]


@pytest.mark.parametrize("recipe", QUICK, ids=lambda recipe: recipe.name)
def test_it_works_after_the_capture(
    recipe: Recipe, templates: Templates, sandboxes: Sandboxes
) -> None:
    assert_works(recipe, templates, sandboxes)


def test_a_servers_keys_are_each_sandboxs_own(templates: Templates, sandboxes: Sandboxes) -> None:
    """Made by the recipe, taken out of the template, and another's in each sandbox."""
    # Without the package, which takes long to install: what the host goes by is its settings.
    template = templates.ready(
        "debian-12",
        "touch /etc/ssh/sshd_config && ssh-keygen -q -N '' -t ed25519 "
        "-f /etc/ssh/ssh_host_ed25519_key && ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
    )
    baked = templates.get(template)["steps"][0]["output"]
    shown = [
        sandboxes.boot(template).exec(
            "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub && ssh-keygen -yf "
            "/etc/ssh/ssh_host_ed25519_key && ssh-keygen -lf /etc/ssh/ssh_host_ecdsa_key.pub && "
            "wc -c </etc/machine-id"
        )
        for _ in range(2)
    ]
    assert [one.exit_code for one in shown] == [0, 0], shown
    fingerprints = {baked.split()[1], *(one.stdout.split()[1] for one in shown)}
    assert len(fingerprints) == 3
    assert all(one.stdout.splitlines()[-1] == "33" for one in shown)
