"""Services are tested against a host in memory; `tests/clients` drives the real one."""

from __future__ import annotations

from tests.fakes.fixtures import host as host
from tests.fakes.fixtures import make_template as make_template
from tests.fakes.fixtures import plans as plans
