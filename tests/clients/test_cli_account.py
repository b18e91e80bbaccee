"""The account commands of the official command line, and what it says of what we lack."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.test_cli import Cli
from tests.stack import Stack


@pytest.fixture
def orkestr(stack: Stack, tmp_path: Path) -> Cli:
    return Cli(stack, tmp_path)


@pytest.fixture
def person(stack: Stack) -> Iterator[httpx.Client]:
    """The demo team's owner in a browser without scripts."""
    with httpx.Client(base_url=stack.url, trust_env=False, follow_redirects=True) as browser:
        fields = {"email": stack.credentials.user, "password": stack.credentials.password}
        submit(browser, "/sign-in/", fields)
        yield browser


def submit(browser: httpx.Client, page: str, fields: dict[str, str]) -> str:
    """Send the form on ``page`` to itself; the page that answers."""
    form = browser.get(page).text
    token = form.partition('name="csrfmiddlewaretoken" value="')[2].partition('"')[0]
    body = {**fields, "csrfmiddlewaretoken": token}
    return browser.post(page.partition("?")[0], data=body).text


def settings_of(orkestr: Cli) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(orkestr.settings.read_text())
    return found


def done(orkestr: Cli, *arguments: str) -> str:
    result = orkestr(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def started(orkestr: Cli) -> str:
    """Begin a login without waiting for it; the address that it shows."""
    said = done(orkestr, "login", "--no-wait", "--no-browser")
    pending = settings_of(orkestr)["pending_login"]
    assert pending["user_code"] in said
    assert pending["url"] in said
    return str(pending["url"])


def answer(person: httpx.Client, address: str, word: str, **choices: str) -> str:
    code = address.partition("code=")[2]
    page = address[address.index("/device/") :]
    assert code in person.get(page).text
    return submit(person, page, {"code": code, "answer": word, **choices})


def test_log_in_with_a_token_and_ask_who_one_is(stack: Stack, orkestr: Cli) -> None:
    assert "Logged in as Demo Admin." in done(orkestr, "login", "--token", stack.api_key)
    told = json.loads(done(orkestr, "--json", "whoami"))
    assert (told["email"], told["plan"], told["is_active"]) == (
        stack.credentials.user,
        "team",
        True,
    )
    shown = done(orkestr, "whoami")
    assert re.search(r"Username: +Demo Admin\n", shown)
    assert re.search(r"Created: +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", shown)
    # A pasted token is only forgotten.
    assert "It is still valid" in done(orkestr, "logout")
    with stack.client() as client:
        assert client.get("/v1/sandboxes").status_code == 200
    assert orkestr("whoami").returncode == 1


def test_a_token_that_was_typed_wrong_is_refused(stack: Stack, orkestr: Cli) -> None:
    result = orkestr("login", "--token", stack.api_key[:-1] + "_")
    assert result.returncode == 1
    assert "Authentication required" in result.stderr


def test_create_list_and_delete_tokens(stack: Stack, orkestr: Cli) -> None:
    made = json.loads(done(orkestr, "--json", "tokens", "create", "ci", "--expires-in-days", "7"))
    listed = json.loads(done(orkestr, "--json", "tokens", "list"))["tokens"]
    row = next(one for one in listed if one["id"] == made["id"])
    assert (row["name"], row["last_used_at"]) == ("ci", None)
    assert row["expires_at"]
    headers = {"Authorization": f"Bearer {made['token']}"}
    with httpx.Client(base_url=stack.url, headers=headers, trust_env=False) as client:
        assert client.get("/v1/sandboxes").status_code == 200
        # The list shows the beginning of an id, and that is enough to name it.
        assert made["id"][:8] in done(orkestr, "tokens", "list")
        assert "Token revoked." in done(orkestr, "tokens", "delete", made["id"][:8], "--yes")
        assert client.get("/v1/sandboxes").status_code == 401
    listed = json.loads(done(orkestr, "--json", "tokens", "list"))["tokens"]
    assert made["id"] not in {one["id"] for one in listed}
    shown = done(orkestr, "tokens", "create", "shown")
    text = re.search(r"Token: (ork_\w+)", shown)
    assert text is not None
    done(orkestr, "tokens", "delete", text[1].split("_")[1], "--yes")


def test_log_in_with_a_browser_use_it_and_log_out(
    stack: Stack, orkestr: Cli, person: httpx.Client
) -> None:
    orkestr.settings.write_text(json.dumps({"api_url": stack.url}))
    assert "Approved" in answer(person, started(orkestr), "approve", access="write", days="30")
    said = done(orkestr, "login")
    assert "Logged in as Demo Admin." in said
    assert "sandboxes:read sandboxes:write" in said
    assert settings_of(orkestr)["token_source"] == "device"
    assert json.loads(done(orkestr, "sbx", "list", "--json")) is not None
    name = re.search(r"Token: (.+) \(scopes", said)
    assert name is not None
    assert name[1].startswith("orkestr CLI on ")
    # Listed with the others, in the console and on the command line.
    assert name[1] in person.get("/team/tokens/").text
    listed = json.loads(done(orkestr, "--json", "tokens", "list"))["tokens"]
    assert name[1] in {row["name"] for row in listed}
    first = settings_of(orkestr)["api_token"]
    # Logging in anew retires the former token, and logging out the one that is in use.
    answer(person, started(orkestr), "approve", access="read", days="")
    assert "expires: never" in done(orkestr, "login")
    second = settings_of(orkestr)["api_token"]
    assert statuses(stack, first, second) == [401, 200]
    assert "Logged out." in done(orkestr, "logout")
    assert statuses(stack, second) == [401]


def statuses(stack: Stack, *tokens: str) -> list[int]:
    with httpx.Client(base_url=stack.url, trust_env=False) as client:
        asked = [{"Authorization": f"Bearer {token}"} for token in tokens]
        return [client.get("/v1/sandboxes", headers=one).status_code for one in asked]


def test_a_login_that_is_denied(orkestr: Cli, person: httpx.Client) -> None:
    assert "Denied" in answer(person, started(orkestr), "deny")
    result = orkestr("login")
    assert result.returncode == 1
    assert "This login request was denied." in result.stderr
    assert "pending_login" not in settings_of(orkestr)


def test_a_login_of_a_console_that_has_forgotten_it(orkestr: Cli) -> None:
    started(orkestr)
    settings = settings_of(orkestr)
    settings["pending_login"]["device_code"] = "x" * 43
    orkestr.settings.write_text(json.dumps(settings))
    result = orkestr("login")
    assert result.returncode == 1
    assert "start another one" in result.stderr


@pytest.mark.parametrize("words", [("projects", "list"), ("dashboard",), ("domains", "list")])
def test_what_this_console_lacks_is_one_plain_line(orkestr: Cli, words: tuple[str, ...]) -> None:
    result = orkestr(*words)
    assert result.returncode == 1
    assert result.stderr.startswith("Error (404): This console has no such API route")
    assert len(result.stderr.splitlines()) == 1
