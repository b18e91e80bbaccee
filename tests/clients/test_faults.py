"""A few cells of the kill matrix (:mod:`tests.faults`): those that break the most at once.

`make faults` runs them all. Here each is seen to reach its moment, and what is struck to be gone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.faults.cell import Known, run_cell
from tests.faults.installation import Installation
from tests.faults.processes import PROCESSES
from tests.faults.truth import settled_holdings
from tests.stack import Stack

CELLS = (
    ("agent", "creates"),
    ("launchers", "stream"),
    ("postgres", "delete"),
    ("squid-kid", "upload"),
)
NAMED = {process.name: process for process in PROCESSES}


@pytest.fixture(scope="module")
def installation(stack: Stack) -> Iterator[Installation]:
    found = Installation(stack)
    yield found
    found.close()


@pytest.fixture(scope="module")
def known(installation: Installation) -> Known:
    return Known(settled_holdings(installation))


@pytest.mark.parametrize(("process", "moment"), CELLS)
def test_what_dies_is_replaced_and_nothing_else_with_it(
    installation: Installation, known: Known, process: str, moment: str
) -> None:
    result = run_cell(installation, known, NAMED[process], signal.SIGKILL, moment)
    assert not result.skipped
    assert result.wrong == (), result
