"""The console's pages over real rows, with a host in memory."""

from __future__ import annotations

import pytest

from orkestr_console.accounts.actor import Actor
from sandboxes_app import services as sandboxes
from sandboxes_app.models import Sandbox
from sandboxes_app.specs import SandboxSpec
from templates_app import services as templates
from templates_app.models import Template
from templates_app.specs import TemplateSpec
from tests.fakes.fixtures import host as host
from tests.fakes.fixtures import plans as plans
from tests.fakes.host import FakeHost


@pytest.fixture(autouse=True)
def every_page_has_a_host(host: FakeHost) -> FakeHost:
    return host


@pytest.fixture
def building(console_actor: Actor) -> Template:
    """A template of Acme that nobody has begun to build."""
    spec = TemplateSpec(
        name="data-stack", base_template="python-3.12", recipe=["pip install pandas", "echo done"]
    )
    return templates.create_template(console_actor, spec)


@pytest.fixture
def sandbox(console_actor: Actor) -> Sandbox:
    """A running sandbox of Acme."""
    return sandboxes.create_sandbox(console_actor, SandboxSpec(template="debian-12"))
