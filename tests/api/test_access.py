"""Who may call what: every route, every method, with every kind of token."""

from __future__ import annotations

from typing import Any

import pytest
from django.test import Client
from django.urls import get_resolver
from django.urls.resolvers import URLPattern, URLResolver

from tests.api.asking import refusal
from tests.fakes.host import FakeHost

TEMPLATE = "/v1/templates/tmpl_01ARZ3NDEKTSV4RRFFQ69G5FAV"
SANDBOX = "/v1/sandboxes/sbx_01ARZ3NDEKTSV4RRFFQ69G5FAV"
COMMAND = f"{SANDBOX}/commands/cmd_01ARZ3NDEKTSV4RRFFQ69G5FAV"
CONTEXT = f"{SANDBOX}/code/contexts/ctx_01ARZ3NDEKTSV4RRFFQ69G5FAV"
WEBHOOK = "/v1/sandboxes/webhooks/whk_01ARZ3NDEKTSV4RRFFQ69G5FAV"
VOLUME = "/v1/sandboxes/volumes/vol_01ARZ3NDEKTSV4RRFFQ69G5FAV"

ROUTES = {
    "/v1/bases": ("GET",),
    "/v1/templates": ("GET", "POST"),
    TEMPLATE: ("GET", "DELETE"),
    f"{TEMPLATE}/cancel": ("POST",),
    f"{TEMPLATE}/contents": ("GET",),
    f"{TEMPLATE}/events": ("GET",),
    f"{TEMPLATE}/log": ("GET",),
    f"{TEMPLATE}/usage": ("GET",),
    "/v1/sandboxes": ("GET", "POST"),
    "/v1/sandboxes/limits": ("GET",),
    SANDBOX: ("GET", "DELETE"),
    f"{SANDBOX}/timeout": ("POST",),
    f"{SANDBOX}/pause": ("POST",),
    f"{SANDBOX}/resume": ("POST",),
    f"{SANDBOX}/exec": ("POST",),
    f"{SANDBOX}/commands": ("GET", "POST"),
    COMMAND: ("GET", "DELETE"),
    f"{COMMAND}/logs": ("GET",),
    f"{SANDBOX}/code": ("POST",),
    f"{SANDBOX}/code/contexts": ("GET", "POST"),
    CONTEXT: ("DELETE",),
    f"{CONTEXT}/restart": ("POST",),
    f"{SANDBOX}/egress": ("GET",),
    f"{SANDBOX}/metrics": ("GET",),
    f"{SANDBOX}/host": ("GET",),
    f"{SANDBOX}/files": ("GET", "POST", "DELETE"),
    f"{SANDBOX}/files/mkdir": ("POST",),
    f"{SANDBOX}/files/move": ("POST",),
    f"{SANDBOX}/files/stat": ("GET",),
    f"{SANDBOX}/files/batch": ("POST",),
    f"{SANDBOX}/files/presign-upload": ("POST",),
    f"{SANDBOX}/files/presign-download": ("POST",),
    f"{SANDBOX}/snapshots": ("POST",),
    "/v1/sandboxes/webhooks": ("GET", "POST"),
    WEBHOOK: ("GET", "DELETE"),
    f"{WEBHOOK}/enable": ("POST",),
    f"{WEBHOOK}/test": ("POST",),
    f"{WEBHOOK}/deliveries": ("GET",),
    "/v1/sandboxes/volumes": ("GET", "POST"),
    VOLUME: ("GET", "PATCH", "DELETE"),
    f"{VOLUME}/move": ("POST",),
    "/v1/sandboxes/snapshots": ("GET",),
    "/v1/sandboxes/snapshots/snap_01ARZ3NDEKTSV4RRFFQ69G5FAV": ("GET", "DELETE"),
}
# By nobody, and never.
UNKNOWN = ("/v1/nothing", "/v1/", "/v1/sandboxes/a/b/c", f"{SANDBOX}/volumes", f"{SANDBOX}/codex")
CALLS = [(path, method) for path, methods in ROUTES.items() for method in methods]
# One that reads, although it is no GET.
READS = {(f"{SANDBOX}/files/presign-download", "POST")}
WRITES = [each for each in CALLS if each[1] != "GET" and each not in READS]
# Its address is all that it needs.
SIGNED = ("transfers/<str:address>",)
# It is the same for everybody.
PUBLIC = ("openapi.json",)
# To cancel takes no body, so none is read.
BODYLESS = ("cancel", "pause", "resume", "restart", "enable", "test")
BODIES = [
    path
    for path, methods in ROUTES.items()
    if "POST" in methods and path.rpartition("/")[2] not in BODYLESS
]
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def call(api: Client, path: str, method: str, body: str = "{}", **headers: str) -> Any:
    return api.generic(method, path, body, content_type="application/json", headers=headers)


def test_the_table_has_every_route_of_the_apps() -> None:
    found = {
        route.pattern.regex.pattern if hasattr(route.pattern, "regex") else ""
        for resolver in get_resolver().url_patterns
        if isinstance(resolver, URLResolver) and str(resolver.pattern) == "v1/"
        for route in resolver.url_patterns
        if isinstance(route, URLPattern)
    }
    assert len(found) == len(ROUTES) + len(SIGNED) + len(PUBLIC)


@pytest.mark.parametrize(("path", "method"), CALLS)
def test_without_a_token_nobody_gets_in(
    anonymous_api: Client, host: FakeHost, path: str, method: str
) -> None:
    answer = call(anonymous_api, path, method)
    refusal(answer, 401, "unauthenticated")
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("path", "method"), CALLS)
@pytest.mark.parametrize(
    "header",
    ["Bearer ork_aaaaaaaaaaaa_" + "b" * 44, "Bearer nonsense", "Bearer", "Basic YTpi", "Bearer é"],
)
def test_with_a_wrong_token_nobody_gets_in(
    anonymous_api: Client, host: FakeHost, path: str, method: str, header: str
) -> None:
    refusal(call(anonymous_api, path, method, Authorization=header), 401, "unauthenticated")


@pytest.mark.parametrize(("path", "method"), WRITES)
def test_a_token_that_may_only_read_changes_nothing(
    read_only_api: Client, host: FakeHost, path: str, method: str
) -> None:
    said = refusal(call(read_only_api, path, method), 403, "insufficient_scope")
    assert "sandboxes:write" in said["detail"]


@pytest.mark.parametrize(("path", "method"), [c for c in CALLS if c not in WRITES])
def test_a_token_that_may_read_reads(
    read_only_api: Client, host: FakeHost, path: str, method: str
) -> None:
    body = "" if method == "GET" else "{}"
    assert call(read_only_api, path, method, body).status_code in {200, 400, 404}


@pytest.mark.parametrize("path", ROUTES)
def test_other_methods_name_those_there_are(api: Client, host: FakeHost, path: str) -> None:
    for method in METHODS:
        if method not in ROUTES[path]:
            answer = call(api, path, method)
            refusal(answer, 405, "method_not_allowed")
            assert set(ROUTES[path]) <= set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("body", ["{", "", "[]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "\x00"])
def test_a_body_that_is_no_json_object_is_refused(
    api: Client, host: FakeHost, path: str, body: str
) -> None:
    answer = call(api, path, "POST", body)
    assert answer.status_code in {400, 415}, answer.content
    assert answer.json()["code"] in {"malformed_json", "invalid_request", "unsupported_media_type"}


@pytest.mark.parametrize("path", BODIES)
def test_a_form_is_not_json(api: Client, host: FakeHost, path: str) -> None:
    refusal(api.post(path, {"name": "x"}), 415, "unsupported_media_type")


@pytest.mark.parametrize("path", UNKNOWN)
def test_what_nobody_knows_is_not_found_in_json(api: Client, host: FakeHost, path: str) -> None:
    refusal(call(api, path, "GET"), 404, "not_found")
