"""Stacks as people set them up: each built restricted, and used where there is no network.

A use is a command and what it must print; what it works on, the recipe made.  Whatever cannot be
had from the registries of pip, npm and apt is taken from Debian (browsers, compilers, R, LaTeX).
"""

from __future__ import annotations

from tests.recipes.stacks.browsers import BROWSERS
from tests.recipes.stacks.data import DATA
from tests.recipes.stacks.databases import DATABASES
from tests.recipes.stacks.documents import DOCUMENTS
from tests.recipes.stacks.languages import LANGUAGES
from tests.recipes.stacks.servers import SERVERS
from tests.recipes.stacks.stack import Stack

__all__ = ["STACKS", "Stack"]

STACKS = (*DATA, *BROWSERS, *DATABASES, *LANGUAGES, *DOCUMENTS, *SERVERS)
