"""The live installation of the client tests, for the whole table."""

from __future__ import annotations

from tests.clients.conftest import sandboxes as sandboxes
from tests.clients.conftest import sdk as sdk
from tests.clients.conftest import stack as stack
from tests.clients.conftest import templates as templates
