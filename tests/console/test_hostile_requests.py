"""What browsers are told, and what they and others are refused: headers, CSRF, redirects, hosts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import CsrfViewMiddleware
from django.test import Client, override_settings
from django.urls import URLPattern, URLResolver, get_resolver

from orkestr_console.accounts.models import AuditEntry, Team, User
from orkestr_console.http.rest import serves
from sandboxes_app.models import Sandbox
from templates_app.models import Template
from tests.conftest import PASSWORD

POLICY = {
    "default-src": "'none'",
    "object-src": "'none'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
    "form-action": "'self'",
    "connect-src": "'self'",
    "img-src": "'self'",
}
# Of what is no page.
NOTHING = dict.fromkeys(["default-src", "base-uri", "form-action", "frame-ancestors"], "'none'")


def policy_of(answer: Any) -> dict[str, str]:
    parts = answer.headers["Content-Security-Policy"].split(";")
    return {name: rest for name, _, rest in (part.strip().partition(" ") for part in parts)}


def broken(request: HttpRequest) -> HttpResponse:
    raise RuntimeError("a defect with a \n secret in it")


@pytest.fixture
def defect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page of the team's usage fails by a defect."""
    monkeypatch.setattr("orkestr_console.console.usage_views.usage.month", broken)


def answers(console: Client, api: Client, building: Template) -> Iterator[tuple[str, Any]]:
    """One answer of each kind there is."""
    stranger = Client(enforce_csrf_checks=True, raise_request_exception=False)
    console.raise_request_exception = False
    yield "page", console.get("/templates/")
    yield "one template", console.get(f"/templates/{building.pk}/")
    yield "page with a secret", console.get("/account/")
    yield "sign-in", stranger.get("/sign-in/")
    yield "redirect", stranger.get("/templates/")
    yield "CSRF failure", stranger.post("/sign-in/")
    yield "404", console.get("/templates/tmpl_none/")
    yield "404 of no route", stranger.get("/nothing/at/all")
    yield "405", console.get("/sign-out/")
    yield "500", console.get("/team/usage/")
    yield "NUL", stranger.get("/templates/%00/")
    yield "host", stranger.get("/", headers={"Host": "evil.example"})
    yield "text", console.get(f"/templates/{building.pk}/steps/1/output/")
    yield "CSV", console.get("/team/audit/csv/")
    yield "REST", api.get("/v1/templates")
    yield "REST 401", stranger.get("/v1/templates")
    yield "REST 404", api.get("/v1/nothing")
    yield "REST 400", api.post("/v1/templates", "{", content_type="application/json")
    yield "REST 405", api.put("/v1/templates")
    yield "health", stranger.get("/healthz")
    yield "style", stranger.get("/static/css/2-base.css")
    yield "script", stranger.get("/static/js/console.js")
    yield "no such file", stranger.get("/static/none.js")


EXPECTED = {
    "CSRF failure": 403,
    "404": 404,
    "404 of no route": 404,
    "405": 405,
    "500": 500,
    "NUL": 400,
    "host": 400,
    "redirect": 302,
    "REST 401": 401,
    "REST 404": 404,
    "REST 400": 400,
    "REST 405": 405,
}


@pytest.mark.usefixtures("defect")
def test_every_answer_there_is_binds_the_browser(
    console: Client, api: Client, building: Template
) -> None:
    for kind, answer in answers(console, api, building):
        # Static files are gathered at start, so that here there are none: then it is a 404.
        missing = kind in {"style", "script", "no such file"} and answer.status_code == 404
        assert missing or answer.status_code == EXPECTED.get(kind, 200), (kind, answer.status_code)
        policy = policy_of(answer)
        if kind.startswith(("REST", "health")):
            assert policy == NOTHING, kind
        else:
            assert {name: policy.get(name) for name in POLICY} == POLICY, kind
            for name in ("script-src", "style-src"):
                assert re.fullmatch(r"'self'( 'nonce-[\w-]+')?", policy[name]), (kind, policy)
        headers = answer.headers
        assert headers["X-Content-Type-Options"] == "nosniff", kind
        assert headers["X-Frame-Options"] == "DENY", kind
        assert headers["Referrer-Policy"] == "same-origin", kind
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin", kind
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin", kind
        assert "camera=()" in headers["Permissions-Policy"], kind
        kept = headers["Cache-Control"]
        assert missing or kind in {"style", "script"} or "private" in kept or "no-store" in kept
        assert "RuntimeError" not in answer.content.decode() and "defect" not in str(headers)


def test_a_page_of_secrets_is_kept_nowhere(console: Client, team: Team) -> None:
    wrong = {"name": "x" * 200, "current": "x"}
    for answer in (
        console.get("/sign-in/"),
        console.get("/account/"),
        console.post("/account/name/", wrong),
        console.post("/account/password/", wrong),
        console.get("/team/people/"),
        console.get("/team/tokens/"),
        console.get("/sandboxes/new/"),
        console.post("/sandboxes/new/", {"env": "KEY=hunter2"}),
        Client().get("/join/nobody/"),
        Client().get("/v1/templates"),
    ):
        assert "no-store" in answer.headers["Cache-Control"], answer.request


def test_the_cookies_are_for_us_alone(alice: User) -> None:
    browser = Client()
    browser.get("/sign-in/")
    browser.post("/sign-in/", {"email": alice.email, "password": PASSWORD})
    browser.get("/account/")
    names = {settings.SESSION_COOKIE_NAME, settings.CSRF_COOKIE_NAME}
    assert set(browser.cookies) == names
    for cookie in browser.cookies.values():
        assert cookie["httponly"]
        assert cookie["samesite"] == "Lax"
        assert (cookie["path"], cookie["domain"]) == ("/", "")


# CSRF ---------------------------------------------------------------------------------------------


def routes(found: Any = None, prefix: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every address as a path, with its view."""
    for entry in found or get_resolver().url_patterns:
        if isinstance(entry, URLResolver):
            yield from routes(entry.url_patterns, prefix + str(entry.pattern))
        elif isinstance(entry, URLPattern):
            path = re.sub(r"<int:\w+>", "1", prefix + str(entry.pattern))
            yield "/" + re.sub(r"<str:\w+>", "x", path), entry.callback


CONSOLE = [path for path, _ in routes() if not (serves(path) or path.startswith(("/^v1", "/^api")))]


def test_the_walk_finds_the_console() -> None:
    assert {"/sign-in/", "/team/tokens/x/revoke/", "/sandboxes/x/exec/"} <= set(CONSOLE)
    assert len(CONSOLE) > 35


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_no_console_route_does_anything_for_another_site(alice: User, method: str) -> None:
    """Signed in, but with no token of a form of ours: the address itself is refused."""
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    for path in CONSOLE:
        answer = getattr(browser, method)(path, {"x": "y"} if method == "post" else "x=y")
        assert answer.status_code == 403, (method, path)
        assert "t sent from this console" in answer.content.decode()
    assert not AuditEntry.objects.exists()


def test_nothing_is_exempt() -> None:
    """REST does not come past the check at all."""
    assert not {path for path, view in routes() if getattr(view, "csrf_exempt", False)}


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_checks_are_only_read(path: str) -> None:
    answer = Client(enforce_csrf_checks=True).post(path)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "GET, HEAD"


def test_rest_knows_nobody_by_cookie(console: Client, building: Template) -> None:
    assert console.get(f"/templates/{building.pk}/").status_code == 200
    for call in (console.get, console.delete):
        assert call(f"/v1/templates/{building.pk}").status_code == 401
    assert Template.objects.filter(pk=building.pk).exists()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://testserver.evil.example"},
        {"Origin": "http://testserver:81"},
    ],
)
def test_a_stolen_token_of_a_form_is_no_use_elsewhere(alice: User, headers: dict[str, str]) -> None:
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(alice)
    token = re.search(
        r'csrfmiddlewaretoken" value="(\w+)"', browser.get("/account/").content.decode()
    )
    assert token
    form = {"csrfmiddlewaretoken": token[1], "name": "Mallory"}
    assert browser.post("/account/name/", form, headers=headers).status_code == 403
    alice.refresh_from_db()
    assert alice.name == "Alice"
    assert browser.post("/account/name/", form).status_code == 302


@pytest.mark.parametrize(
    ("headers", "extra", "status"),
    [
        ({"X-HTTP-Method-Override": "DELETE"}, "", 200),
        ({"X-Method-Override": "DELETE"}, "", 200),
        # No call has such a parameter.
        ({}, "?_method=DELETE", 400),
    ],
)
def test_a_method_is_what_it_is(
    api: Client, building: Template, headers: dict[str, str], extra: str, status: int
) -> None:
    path = f"/v1/templates/{building.pk}{extra}"
    assert api.post(path, {}, headers=headers).status_code == 405
    assert api.get(path, headers=headers).status_code == status
    assert Template.objects.filter(pk=building.pk).exists()


# Where a page leads -------------------------------------------------------------------------------

AWAY = (
    "https://evil.example/",
    "//evil.example/",
    "///evil.example/",
    "/\\evil.example/",
    "\\\\evil.example/",
    "/\t/evil.example/",
    "\t//evil.example/",
    " //evil.example/",
    "https:evil.example",
    "https:///evil.example",
    "http://testserver@evil.example/",
    "http://testserver.evil.example/",
    "javascript:alert(1)",
    "data:text/html,x",
    "\x00//evil.example",
    "http://[::1/",
    "//evil.example\\@testserver/",
)


@pytest.mark.parametrize("wanted", AWAY)
def test_signing_in_leads_nowhere_else(alice: User, console: Client, wanted: str) -> None:
    form = {"email": alice.email, "password": PASSWORD, "next": wanted}
    answer = Client().post("/sign-in/", form)
    assert (answer.status_code, answer.headers["Location"]) == (302, "/")
    if "\x00" not in wanted:
        # Who is signed in already is sent on at once.
        sent = console.get("/sign-in/", {"next": wanted})
        assert (sent.status_code, sent.headers["Location"]) == (302, "/")
        page = Client().get("/sign-in/", {"next": wanted}).content.decode()
        assert '<input type="hidden" name="next" value="/">' in page


@pytest.mark.parametrize("wanted", ["/templates/", "/join/x/?a=b", "http://testserver/account/"])
def test_it_leads_where_one_wanted_to_go(alice: User, wanted: str) -> None:
    form = {"email": alice.email, "password": PASSWORD, "next": wanted}
    assert Client().post("/sign-in/", form).headers["Location"] == wanted


def test_of_a_field_given_twice_the_one_that_is_checked_is_used(alice: User) -> None:
    form = {"email": alice.email, "password": PASSWORD, "next": ["/account/", "//evil.example/"]}
    assert Client().post("/sign-in/", form).headers["Location"] == "/"
    answer = Client().post("/sign-in/?next=//evil.example/", {**form, "next": "/account/"})
    assert answer.headers["Location"] == "/account/"


@pytest.mark.parametrize(
    "path", ["//evil.example", "//evil.example/templates", "/\\evil.example/x", "/templates//evil"]
)
def test_no_address_redirects_to_another_host(console: Client, path: str) -> None:
    answer = console.get(path)
    place = answer.headers.get("Location", "/")
    assert place.startswith("/") and not place.startswith(("//", "/\\"))


# Hosts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "testserver.evil.example",
        "testserver@evil.example",
        "a b",
        "evil.example:80",
    ],
)
def test_another_hosts_name_is_refused_everywhere(console: Client, host: str) -> None:
    for path in ("/templates/", "/v1/templates", "/sign-in/", "/healthz"):
        answer = console.get(path, headers={"Host": host})
        assert answer.status_code == 400, path
        assert "evil" not in answer.content.decode()


def test_a_forwarded_host_counts_for_nothing(console: Client) -> None:
    headers = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"}
    answer = console.post("/team/people/", {"role": "member"}, headers=headers)
    assert answer.context["link"].startswith("http://testserver/join/")
    assert "evil" not in answer.content.decode()


def test_links_are_made_with_the_address_that_the_operator_set(
    console: Client, sandbox: Sandbox
) -> None:
    """A host header is checked against our names, but its port is not."""
    odd = {"Host": "testserver:6666"}
    with override_settings(PUBLIC_URL_IS_SET=True, PUBLIC_URL="https://console.example"):
        answer = console.post("/team/people/", {"role": "member"}, headers=odd)
        page = console.get(f"/sandboxes/{sandbox.pk}/", headers=odd).content.decode()
    assert answer.context["link"].startswith("https://console.example/join/")
    assert "ORKESTR_BASE_URL=https://console.example<" in page
    assert "6666" not in page


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../manage.py",
        "/static/%2e%2e/manage.py",
        "/static/..%2fmanage.py",
        "/static/css/..%2f..%2f..%2fmanage.py",
        "/static//etc/passwd",
        "/static/%2fetc%2fpasswd",
        "/static/..%5c..%5cmanage.py",
        "/static/./css/../../../manage.py",
    ],
)
def test_nothing_beside_the_static_files_is_served(path: str) -> None:
    answer = Client().get(path)
    assert answer.status_code == 404
    assert b"DJANGO_SETTINGS_MODULE" not in answer.content and b"root:" not in answer.content


def test_the_csrf_check_is_there_to_be_tested() -> None:
    assert f"{CsrfViewMiddleware.__module__}.{CsrfViewMiddleware.__name__}" in settings.MIDDLEWARE
