"""The cast every test of the console knows, and the clients they call with.

alice owns team Acme, bob is a member of it; charlie owns team Globex and must never see what is
Acme's. Acme is on plan Team, Globex on plan Pro.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest
from django.conf import settings
from django.test import Client, TransactionTestCase, override_settings

from orkestr_console.accounts.actor import READ, WRITE, Actor
from orkestr_console.accounts.models import Membership, Role, Team, User
from orkestr_console.accounts.services import authenticate_token, mint_token, user_actor
from tests.api.describing import DescribedClient
from tests.emptying import empty_tables

PASSWORD = "correct horse battery staple"

# Names of static files need no collected manifest in tests, and passwords no slow hash.
TEST_SETTINGS: dict[str, Any] = {
    "STORAGES": {
        "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    },
    "PASSWORD_HASHERS": ["django.contrib.auth.hashers.MD5PasswordHasher"],
}


@pytest.fixture(scope="session", autouse=True)
def settings_for_tests() -> Iterator[None]:
    with override_settings(**TEST_SETTINGS):
        yield


@pytest.fixture(scope="session", autouse=True)
def fast_table_cleanup() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransactionTestCase, "_fixture_teardown", empty_tables)
        yield


@pytest.fixture(scope="session")
def django_db_modify_db_settings() -> None:
    """Let the clean-up after a test that commits truncate the audit log, as nothing else may."""
    options = settings.DATABASES["default"].setdefault("OPTIONS", {})
    options["options"] = f"{options.get('options', '')} -c orkestr.truncates_audit=on".strip()


def make_user(name: str, team: Team, role: str) -> User:
    user = User.objects.create_user(f"{name}@example.org", PASSWORD, name=name.title())
    Membership.objects.create(user=user, team=team, role=role)
    return user


@pytest.fixture
def team(db: None) -> Team:
    return Team.objects.create(name="Acme", slug="acme", plan_id="team")


@pytest.fixture
def other_team(db: None) -> Team:
    return Team.objects.create(name="Globex", slug="globex", plan_id="pro")


@pytest.fixture
def alice(team: Team) -> User:
    return make_user("alice", team, Role.OWNER)


@pytest.fixture
def bob(team: Team) -> User:
    return make_user("bob", team, Role.MEMBER)


@pytest.fixture
def charlie(other_team: Team) -> User:
    return make_user("charlie", other_team, Role.OWNER)


type MakeKey = Callable[..., str]


@pytest.fixture
def make_key(db: None) -> MakeKey:
    """Makes an API token: ``make_key(team, READ, expires_at=…)`` is its text."""

    def make(team: Team, *scopes: str, expires_at: datetime | None = None) -> str:
        _, text = mint_token(team, "Test", scopes or (READ, WRITE), expires_at=expires_at)
        return text

    return make


@pytest.fixture
def key(team: Team, make_key: MakeKey) -> str:
    """A token of Acme with both scopes."""
    return make_key(team)


@pytest.fixture
def actor(key: str) -> Actor:
    """Acme calling over REST with both scopes."""
    return authenticate_token(key, "rest", "192.0.2.1")


@pytest.fixture
def console_actor(alice: User) -> Actor:
    """alice calling from the console."""
    return user_actor(alice, None, "192.0.2.1")


@pytest.fixture
def other_actor(other_team: Team, make_key: MakeKey) -> Actor:
    """Globex calling over REST with both scopes."""
    return authenticate_token(make_key(other_team), "rest", "192.0.2.2")


def api_client(key: str | None) -> Client:
    """A client of the REST API that sends ``key``, or no token for None.

    It fails for an answer that the OpenAPI document does not describe.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return DescribedClient(headers=headers, enforce_csrf_checks=True)


@pytest.fixture
def api(key: str) -> Client:
    """The REST API as Acme calls it."""
    return api_client(key)


@pytest.fixture
def read_only_api(team: Team, make_key: MakeKey) -> Client:
    """The REST API as Acme calls it with a token that may only read."""
    return api_client(make_key(team, READ))


@pytest.fixture
def other_api(other_team: Team, make_key: MakeKey) -> Client:
    """The REST API as Globex calls it."""
    return api_client(make_key(other_team))


@pytest.fixture
def anonymous_api(db: None) -> Client:
    """The REST API without a token."""
    return api_client(None)


@pytest.fixture
def console(alice: User) -> Client:
    """The console as alice sees it, signed in."""
    client = Client()
    client.force_login(alice)
    return client


@pytest.fixture
def other_console(charlie: User) -> Client:
    """The console as charlie sees it, signed in."""
    client = Client()
    client.force_login(charlie)
    return client
