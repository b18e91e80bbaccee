from __future__ import annotations

from typing import Any

import pytest
from django.test import Client

from orkestr_console.accounts.models import AuditEntry, User
from tests.conftest import PASSWORD


@pytest.fixture
def stranger(db: None) -> Client:
    return Client(enforce_csrf_checks=True)


def sign_in(client: Client, email: str, password: str, onward: str = "") -> Any:
    page = client.get("/sign-in/", {"next": onward})
    token = page.context["csrf_token"]
    form = {"email": email, "password": password, "csrfmiddlewaretoken": token, "next": onward}
    return client.post("/sign-in/", form)


def test_a_person_signs_in_with_their_address_in_any_case(stranger: Client, alice: User) -> None:
    answer = sign_in(stranger, "ALICE@example.org ", PASSWORD, "/sandboxes/")
    assert (answer.status_code, answer["Location"]) == (302, "/sandboxes/")
    assert stranger.get("/sandboxes/").status_code == 200


@pytest.mark.parametrize(
    ("email", "password"),
    [
        ("alice@example.org", "wrong"),
        ("nobody@example.org", PASSWORD),
        ("alice@example.org\0", PASSWORD),
        ("", ""),
    ],
)
def test_a_refusal_is_the_same_whatever_was_wrong(
    stranger: Client, alice: User, email: str, password: str
) -> None:
    answer = sign_in(stranger, email, password)
    assert answer.status_code == 400
    assert "Wrong email or password" in answer.content.decode()
    assert password == "" or password not in answer.content.decode()


@pytest.mark.parametrize(
    "onward", ["https://evil.example/", "//evil.example/", "javascript:alert(1)", "/\\evil.example"]
)
def test_signing_in_never_leads_elsewhere(stranger: Client, alice: User, onward: str) -> None:
    answer = sign_in(stranger, "alice@example.org", PASSWORD, onward)
    assert answer["Location"] == "/"


def test_pages_send_strangers_to_sign_in_and_back(stranger: Client) -> None:
    answer = stranger.get("/templates/new/")
    assert answer["Location"] == "/sign-in/?next=/templates/new/"


def test_signing_out_takes_a_post(console: Client) -> None:
    assert console.get("/sign-out/").status_code == 405
    assert console.post("/sign-out/")["Location"] == "/sign-in/"
    assert console.get("/templates/").status_code == 302


def test_posting_needs_the_pages_own_token(alice: User) -> None:
    client = Client(enforce_csrf_checks=True)
    client.force_login(alice)
    assert client.post("/templates/new/", {"name": "x"}).status_code == 403
    assert client.post("/sign-out/").status_code == 403


def test_pages_carry_a_strict_policy_and_nothing_inline(console: Client) -> None:
    answer = console.get("/templates/new/")
    assert "unsafe" not in answer["Content-Security-Policy"]
    page = answer.content.decode()
    assert " style=" not in page
    assert "<style" not in page
    assert " onclick=" not in page
    assert page.count("<script") == page.count("<script src=")


def test_somebody_without_a_team_is_told_so(alice: User) -> None:
    alice.memberships.all().delete()
    client = Client()
    client.force_login(alice)
    answer = client.get("/templates/")
    assert answer.status_code == 403
    assert "You are in no team yet" in answer.content.decode()


def test_guessing_is_locked_out_and_the_sentence_says_how_long(alice: User) -> None:
    guesser = Client()
    form = {"email": "alice@example.org", "password": "guess"}
    answers = [guesser.post("/sign-in/", form).content.decode() for _ in range(5)]
    assert "Wrong email or password" in answers[0]
    assert "Try again in 15 minutes" in answers[-1]
    # The right password in another spelling of the address is not let in either.
    form = {"email": "ALICE@example.org", "password": PASSWORD}
    assert "Try again in 15 minutes" in guesser.post("/sign-in/", form).content.decode()


def test_an_address_without_an_account_is_locked_out_just_the_same(db: None) -> None:
    form = {"email": "nobody@example.org", "password": "guess"}
    answers = [Client().post("/sign-in/", form).content.decode() for _ in range(5)]
    assert "Try again in 15 minutes" in answers[-1]


def test_guesses_from_elsewhere_lock_nobody_out(alice: User) -> None:
    form = {"email": "alice@example.org", "password": "guess"}
    for _ in range(6):
        Client().post("/sign-in/", form, REMOTE_ADDR="198.51.100.7")
    answer = Client().post("/sign-in/", {**form, "password": PASSWORD}, REMOTE_ADDR="192.0.2.9")
    assert answer.status_code == 302


def test_signing_in_and_a_refusal_are_on_record(alice: User) -> None:
    form = {"email": "Alice@example.org", "password": "guess"}
    Client().post("/sign-in/", form)
    Client().post("/sign-in/", {**form, "password": PASSWORD})
    rows = AuditEntry.objects.filter(action="session.create").order_by("pk")
    assert [(row.outcome, row.address) for row in rows] == [
        ("denied", "127.0.0.1"),
        ("done", "127.0.0.1"),
    ]
