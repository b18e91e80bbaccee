"""A person's own account: name, password, sessions, two-step sign-in."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from django.test import Client
from django_otp.oath import TOTP
from django_otp.plugins.otp_totp.models import TOTPDevice

from orkestr_console.accounts.models import AuditEntry, SignedIn, User
from tests.conftest import PASSWORD
from tests.console.markup import tight

BETTER = "a better passphrase than that"


def text(answer: Any) -> str:
    return tight(answer)


def code_of(device: TOTPDevice, steps: int = 0) -> str:
    """What an authenticator app shows, ``steps`` periods from now."""
    app = TOTP(device.bin_key, step=device.step, t0=device.t0, digits=device.digits)
    app.time = time.time() + steps * device.step
    return f"{app.token():06d}"


def sign_in(password: str = PASSWORD, agent: str = "Firefox") -> tuple[Client, Any]:
    """A browser, and what it got for alice's password."""
    browser = Client(headers={"User-Agent": agent})
    form = {"email": "alice@example.org", "password": password}
    return browser, browser.post("/sign-in/", form)


@pytest.fixture
def signed_in(alice: User) -> Client:
    """A browser alice has signed in with by her password."""
    return sign_in()[0]


@pytest.fixture
def codes(alice: User, signed_in: Client) -> list[str]:
    """Two-step sign-in is on; the recovery codes."""
    signed_in.post("/account/code/begin/")
    device = TOTPDevice.objects.get(user=alice)
    page = text(signed_in.post("/account/code/confirm/", {"code": code_of(device)}))
    found = re.search(r'id="recovery-codes">([^<]+)<', page)
    assert found
    # A code counts once: the next sign-in has the app's next one.
    TOTPDevice.objects.update(throttling_failure_count=0, throttling_failure_timestamp=None)
    return found[1].split()


def test_a_name_is_changed(signed_in: Client, alice: User) -> None:
    assert "Alicia" in text(signed_in.post("/account/name/", {"name": "Alicia"}, follow=True))
    answer = signed_in.post("/account/name/", {"name": "x" * 101})
    assert answer.status_code == 400
    assert "at most 100 characters" in text(answer)
    alice.refresh_from_db()
    assert alice.name == "Alicia"


def test_a_new_password_signs_the_other_browsers_out_and_not_this_one(signed_in: Client) -> None:
    other, _ = sign_in(agent="Chrome")
    typed = {"current": PASSWORD, "password": BETTER}
    assert signed_in.post("/account/password/", typed).status_code == 302
    assert signed_in.get("/account/").status_code == 200
    assert other.get("/templates/").status_code == 302
    assert sign_in()[1].status_code == 400
    assert sign_in(BETTER)[1].status_code == 302


@pytest.mark.parametrize(
    ("typed", "field"),
    [
        ({"current": "wrong", "password": BETTER}, "current"),
        ({"current": PASSWORD, "password": "short"}, "password"),
        ({}, "current"),
    ],
)
def test_a_password_is_changed_by_who_knows_it_to_a_good_one(
    signed_in: Client, alice: User, typed: dict[str, str], field: str
) -> None:
    answer = signed_in.post("/account/password/", typed)
    assert answer.status_code == 400
    assert f'id="{field}-error"' in text(answer)
    alice.refresh_from_db()
    assert alice.check_password(PASSWORD)


def test_sessions_are_listed_and_ended_one_by_one(signed_in: Client, alice: User) -> None:
    other, _ = sign_in(agent="Chrome")
    page = text(signed_in.get("/account/"))
    assert "Firefox" in page and "Chrome" in page and page.count("this device") == 1
    row = SignedIn.objects.get(user=alice, user_agent="Chrome")
    assert signed_in.post(f"/account/sessions/{row.pk}/end/").status_code == 302
    assert other.get("/templates/").status_code == 302
    assert signed_in.get("/templates/").status_code == 200
    assert signed_in.post(f"/account/sessions/{row.pk}/end/").status_code == 404


@pytest.mark.parametrize(
    ("user_agent", "shown"),
    [
        (
            "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) "
            "Chrome/131.0.0.0 Safari/537.36 Edg/131.0.0.0",
            "Edge on Windows",
        ),
        (
            "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15 "
            "(KHTML, like Gecko) Version/17.5 Mobile/15E148 Safari/604.1",
            "Safari on iPhone",
        ),
        ("Mozilla/5.0 (X11; Linux x86_64; rv:133.0) Gecko/20100101 Firefox/133.0", "Firefox on L"),
        ("curl/8.9", "curl/8.9"),
        ("", "unknown"),
    ],
)
def test_a_browser_is_called_by_its_name(alice: User, user_agent: str, shown: str) -> None:
    browser, _ = sign_in(agent=user_agent)
    assert f'title="{user_agent}">{shown}' in text(browser.get("/account/"))


def test_all_other_sessions_are_ended_at_once(signed_in: Client) -> None:
    others = [sign_in(agent=agent)[0] for agent in ("Chrome", "Safari")]
    page = text(signed_in.post("/account/sessions/end-others/", follow=True))
    assert "2 other browsers were signed out" in page
    assert [other.get("/templates/").status_code for other in others] == [302, 302]


def test_signing_out_takes_the_session_off_the_list(signed_in: Client, alice: User) -> None:
    signed_in.post("/sign-out/")
    assert not SignedIn.objects.filter(user=alice).exists()


# Two-step sign-in ---------------------------------------------------------------------------


def test_a_secret_counts_for_nothing_until_a_code_of_it_was_typed(
    signed_in: Client, alice: User
) -> None:
    page = text(signed_in.post("/account/code/begin/", follow=True))
    assert "<svg" in page and 'id="totp-secret"' in page
    assert sign_in()[1]["Location"] == "/"
    answer = signed_in.post("/account/code/confirm/", {"code": "000000"})
    assert answer.status_code == 400
    assert 'id="code-error"' in text(answer)
    assert sign_in()[1]["Location"] == "/"


def test_then_a_password_alone_signs_nobody_in(codes: list[str], alice: User) -> None:
    halfway, answer = sign_in()
    assert answer["Location"].startswith("/sign-in/code/")
    assert halfway.get("/templates/").status_code == 302
    device = TOTPDevice.objects.get(user=alice)
    shown = code_of(device, 1)
    answer = halfway.post("/sign-in/code/", {"code": f"{shown[:3]} {shown[3:]}", "next": "/teams/"})
    assert answer["Location"] == "/teams/"
    assert halfway.get("/templates/").status_code == 200
    # The same code again is refused: whoever looked over a shoulder has nothing.
    again, _ = sign_in()
    assert again.post("/sign-in/code/", {"code": shown}).status_code == 400


def test_a_recovery_code_works_once(codes: list[str]) -> None:
    assert len(set(codes)) == 10
    first, _ = sign_in()
    assert first.post("/sign-in/code/", {"code": codes[0]}).status_code == 302
    assert "9 recovery codes left" in text(first.get("/account/"))
    second, _ = sign_in()
    assert second.post("/sign-in/code/", {"code": codes[0]}).status_code == 400


def test_a_wrong_code_is_said_and_on_record(codes: list[str], alice: User) -> None:
    halfway, _ = sign_in()
    for code in ("000000", "", "\0", "x" * 5000):
        answer = halfway.post("/sign-in/code/", {"code": code})
        assert answer.status_code == 400
        assert "Invalid or already used code" in text(answer)
    assert halfway.get("/templates/").status_code == 302
    assert AuditEntry.objects.filter(action="session.create", outcome="denied").count() == 4


def test_guessing_codes_is_slowed_down(codes: list[str], alice: User) -> None:
    halfway, _ = sign_in()
    halfway.post("/sign-in/code/", {"code": "000000"})
    device = TOTPDevice.objects.get(user=alice)
    assert device.throttling_failure_count == 1
    # Each doubles the wait: after one it is a second, which a busy machine may take by itself.
    device.throttling_failure_count = 12
    device.save()
    assert halfway.post("/sign-in/code/", {"code": code_of(device, 1)}).status_code == 400


def test_the_second_step_has_five_minutes(
    codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    halfway, _ = sign_in()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 301)
    answer = halfway.post("/sign-in/code/", {"code": codes[0]})
    assert answer["Location"] == "/sign-in/"


def test_nobody_reaches_the_second_step_without_the_first(codes: list[str]) -> None:
    answer = Client().post("/sign-in/code/", {"code": codes[0]})
    assert answer["Location"] == "/sign-in/"


def test_it_is_turned_off_with_the_password(codes: list[str], signed_in: Client) -> None:
    answer = signed_in.post("/account/code/off/", {"current": "wrong"})
    assert answer.status_code == 400
    assert sign_in()[1]["Location"].startswith("/sign-in/code/")
    signed_in.post("/account/code/off/", {"current": PASSWORD})
    assert sign_in()[1]["Location"] == "/"
