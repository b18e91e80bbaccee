"""A sandbox that the host refuses to start, and others who are at its rows just then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.db import connection

from orkestr_console.accounts.actor import Actor, system_actor
from orkestr_console.accounts.models import Team
from orkestr_console.core.errors import DomainError, FleetFull
from sandboxes_app import services
from sandboxes_app.models import Sandbox, SandboxEvent, Volume
from sandboxes_app.specs import SandboxSpec
from tests.fakes.host import FakeHost
from tests.stack import wait_for

# The other is done, or waits for a lock of this one's.
MEANWHILE_SECONDS = 60
WAITING_SQL = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock'
"""

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("plans")]


class Meanwhile:
    """Calls something in another thread once, just before a certain statement of this one."""

    def __init__(self, statement: str, call: Callable[[], object]) -> None:
        self.outcome: object = None
        self._statement, self._call = statement, call
        self._thread = threading.Thread(target=self._run)

    def __call__(self, execute: Callable[..., Any], sql: str, *rest: Any) -> Any:
        if sql.startswith(self._statement) and self._thread.ident is None:
            self._thread.start()
            wait_for(lambda: not self._thread.is_alive() or is_waited_for(), MEANWHILE_SECONDS)
        return execute(sql, *rest)

    def _run(self) -> None:
        try:
            self.outcome = self._call()
        except Exception as error:  # noqa: BLE001 - what it came to
            self.outcome = error
        finally:
            connection.close()

    def during(self, call: Callable[[], object]) -> None:
        with connection.execute_wrapper(self):
            call()
        self._thread.join(60)


def is_waited_for() -> bool:
    with connection.cursor() as cursor:
        # Within a transaction, it would show those that there were at first.
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute(WAITING_SQL)
        return bool(cursor.fetchone()[0])


@pytest.fixture
def own(team: Team) -> Actor:
    return system_actor(team)


def refused(actor: Actor) -> None:
    with pytest.raises(FleetFull):
        services.create_sandbox(actor, SandboxSpec(template="debian-12", volume="data"))


def test_whoever_ends_it_meanwhile_spoils_nothing(own: Actor, host: FakeHost) -> None:
    host.full = True

    def terminate() -> Sandbox:
        return services.terminate_sandbox(own, Sandbox.objects.get().pk)

    deletion = f'DELETE FROM "{Sandbox._meta.db_table}" '
    other = Meanwhile(deletion, terminate)
    other.during(lambda: refused(own))
    assert isinstance(other.outcome, DomainError)
    assert other.outcome.status == 404
    for rows in (Sandbox, SandboxEvent, Volume):
        assert not rows._default_manager.exists()


def test_whoever_wants_its_volume_gets_one_of_their_own(own: Actor, host: FakeHost) -> None:
    host.full = True

    def create() -> Sandbox:
        host.full = False
        return services.create_sandbox(own, SandboxSpec(template="debian-12", volume="data"))

    other = Meanwhile(f'DELETE FROM "{Volume._meta.db_table}" ', create)
    other.during(lambda: refused(own))
    assert isinstance(other.outcome, Sandbox)
    assert other.outcome.volume_id == Volume.objects.get().pk
