"""Who is let into the REST API, and what everyone else is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.http import HttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from django.utils import timezone
from pydantic import BaseModel, ConfigDict
from pytest_django import DjangoAssertNumQueries

from orkestr_console import urls
from orkestr_console.accounts.actor import EVERYTHING, READ, WRITE
from orkestr_console.accounts.models import ApiToken, Team
from orkestr_console.accounts.services import revoke_token
from orkestr_console.http.decorators import ApiRequest, api, methods
from orkestr_console.http.json_api import json_response, read_json
from tests.conftest import MakeKey, api_client


class Thing(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    name: str


@api(scope=READ)
def look(request: ApiRequest) -> HttpResponse:
    return json_response({"team": request.actor.team.name, "surface": request.actor.surface})


@api(scope=WRITE)
def make(request: ApiRequest) -> HttpResponse:
    return json_response({"name": read_json(request, Thing).name}, status=201)


@api(scope=READ)
async def stream(request: ApiRequest) -> HttpResponse:
    return json_response({"team": request.actor.team.name})


@api(scope=READ)
def broken(request: ApiRequest) -> HttpResponse:
    raise RuntimeError("a secret detail")


@api(scope=READ, methods=("POST",))
def post_alone(request: ApiRequest) -> HttpResponse:
    return json_response({})


urlpatterns = [
    path("v1/things", methods(GET=look, POST=make)),
    path("v1/stream", methods(GET=stream, POST=make)),
    path("v1/broken", methods(GET=broken)),
    path("v1/post-alone", post_alone),
    *urls.urlpatterns,
]
handler400, handler403 = urls.handler400, urls.handler403
handler404, handler500 = urls.handler404, urls.handler500


@pytest.fixture(autouse=True)
def things() -> Iterator[None]:
    with override_settings(ROOT_URLCONF=__name__):
        yield


def refused(response: Any, status: int, code: str) -> str:
    assert response.status_code == status, response.content
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Request-Id"]
    body: dict[str, str] = response.json()
    assert body["code"] == code
    assert body["detail"].endswith((".", "…'."))
    return body["detail"]


def test_a_token_lets_its_team_in(api: Client) -> None:
    response = api.get("/v1/things")
    assert response.status_code == 200
    assert response.json() == {"team": "Acme", "surface": "rest"}
    assert response.headers["X-Request-Id"].startswith("req_")


def test_the_callers_own_request_id_comes_back(api: Client) -> None:
    response = api.get("/v1/things", headers={"X-Request-Id": "trace-12345678"})
    assert response.headers["X-Request-Id"] == "trace-12345678"


def test_a_request_id_that_would_break_a_log_is_replaced(api: Client) -> None:
    response = api.get("/v1/things", headers={"X-Request-Id": "x" * 65})
    assert re.fullmatch(r"req_[0-9A-Z]{26}", response.headers["X-Request-Id"])


def test_no_token_is_a_401_with_a_challenge(anonymous_api: Client) -> None:
    response = anonymous_api.get("/v1/things")
    refused(response, 401, "unauthenticated")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "header",
    ["Basic abc", "Bearer", "Bearer ", "ork_x", "Bearer ork_x", "Bearerork_x", "Token {key}"],
)
def test_anything_but_a_bearer_token_is_a_401(key: str, header: str) -> None:
    client = Client(headers={"Authorization": header.format(key=key)})
    refused(client.get("/v1/things"), 401, "unauthenticated")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer"])
def test_the_scheme_is_read_whatever_its_case(key: str, scheme: str) -> None:
    client = Client(headers={"Authorization": f"{scheme} {key}"})
    assert client.get("/v1/things").status_code == 200


@pytest.mark.parametrize("spoil", [str.lower, lambda k: k[:-1] + "!", lambda k: k + "A"])
def test_a_token_that_is_nearly_right_is_a_401(key: str, spoil: Any) -> None:
    response = api_client(spoil(key)).get("/v1/things")
    refused(response, 401, "unauthenticated")
    assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def test_the_right_lookup_with_a_wrong_secret_says_no_more_than_an_unknown_token(key: str) -> None:
    wrong = key[:-1] + ("A" if key[-1] != "A" else "B")
    unknown = "ork_" + "x" * 12 + "_" + "y" * 44
    details = {
        refused(api_client(k).get("/v1/things"), 401, "unauthenticated") for k in (wrong, unknown)
    }
    assert len(details) == 1


def test_a_revoked_token_is_a_401_that_says_so(key: str) -> None:
    revoke_token(ApiToken.objects.get())
    assert "revoked" in refused(api_client(key).get("/v1/things"), 401, "unauthenticated")


def test_an_expired_token_is_a_401_that_says_so(team: Team, make_key: MakeKey) -> None:
    key = make_key(team, READ, expires_at=timezone.now() - timedelta(seconds=1))
    assert "expired" in refused(api_client(key).get("/v1/things"), 401, "unauthenticated")


def test_a_read_only_token_may_not_write(read_only_api: Client) -> None:
    assert read_only_api.get("/v1/things").status_code == 200
    response = read_only_api.post("/v1/things", {"name": "x"}, content_type="application/json")
    assert "'sandboxes:write'" in refused(response, 403, "insufficient_scope")
    assert "insufficient_scope" in response.headers["WWW-Authenticate"]


@pytest.mark.parametrize("scope", [WRITE, EVERYTHING])
def test_writing_includes_reading(team: Team, make_key: MakeKey, scope: str) -> None:
    client = api_client(make_key(team, scope))
    assert client.get("/v1/things").status_code == 200
    response = client.post("/v1/things", {"name": "x"}, content_type="application/json")
    assert response.status_code == 201


def test_the_token_is_checked_before_the_body(anonymous_api: Client) -> None:
    response = anonymous_api.post("/v1/things", b"{", content_type="application/json")
    refused(response, 401, "unauthenticated")


def test_a_wrong_method_is_a_405_that_lists_the_right_ones(api: Client) -> None:
    response = api.delete("/v1/things")
    refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"] == "GET, POST, HEAD, OPTIONS"
    assert refused(api.get("/v1/post-alone"), 405, "method_not_allowed")


def test_head_is_answered_as_get_without_a_body(api: Client) -> None:
    response = api.head("/v1/things")
    assert (response.status_code, response.content) == (200, b"")


def test_options_lists_the_methods(anonymous_api: Client) -> None:
    response = anonymous_api.options("/v1/things")
    assert (response.status_code, response.content) == (204, b"")
    assert response.headers["Allow"] == "GET, POST, HEAD, OPTIONS"


@pytest.mark.parametrize("address", ["/v1", "/v1/", "/v1/no-such-thing", "/v1/things/"])
def test_an_unknown_route_is_a_404_in_json(api: Client, address: str) -> None:
    refused(api.get(address), 404, "not_found")


def test_an_unknown_route_without_a_token_is_a_401(anonymous_api: Client) -> None:
    refused(anonymous_api.get("/v1/no-such-thing"), 401, "unauthenticated")


def test_a_defect_is_a_500_in_json_that_tells_nothing(api: Client) -> None:
    api.raise_request_exception = False
    response = api.get("/v1/broken")
    refused(response, 500, "internal_error")
    assert response.json()["request_id"] == response.headers["X-Request-Id"]
    assert b"secret detail" not in response.content


@pytest.mark.parametrize("address", ["/v1/things?a=%00", "/v1/th%00ings", "/v1/things?%00=b"])
def test_nul_in_the_address_is_a_400(api: Client, address: str) -> None:
    refused(api.get(address), 400, "invalid_request")


def test_a_session_is_no_token(console: Client) -> None:
    refused(console.get("/v1/things"), 401, "unauthenticated")


def test_a_call_is_let_in_by_one_statement(
    api: Client, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    # The first notes the token's use, so the second reads it again.
    for _ in range(2):
        api.get("/v1/things")
    # What is known of the token is still so, and it is within its rate.
    with django_assert_num_queries(1):
        api.get("/v1/things")


def test_the_last_use_is_noted_once_a_minute(api: Client) -> None:
    api.get("/v1/things")
    first = ApiToken.objects.get().last_used_at
    assert first is not None
    api.get("/v1/things")
    assert ApiToken.objects.get().last_used_at == first
    ApiToken.objects.update(last_used_at=first - timedelta(seconds=61))
    api.get("/v1/things")
    assert ApiToken.objects.get().last_used_at >= first  # type: ignore[operator]


@pytest.mark.django_db(transaction=True)
async def test_an_async_view_is_guarded_the_same(plans: None, key: str) -> None:
    client = AsyncClient()
    refused(await client.get("/v1/stream"), 401, "unauthenticated")
    headers = {"Authorization": f"Bearer {key}"}
    good = await client.get("/v1/stream", headers=headers)
    assert good.json() == {"team": "Acme"}
    refused(await client.delete("/v1/stream", headers=headers), 405, "method_not_allowed")
    made = await client.post(
        "/v1/stream", {"name": "x"}, content_type="application/json", headers=headers
    )
    assert made.status_code == 201


def test_a_host_name_that_is_not_ours_is_refused_and_the_remedy_named(key: str) -> None:
    response = api_client(key).get("/v1/things", headers={"Host": "evil.example"})
    assert "ORKESTR_ALLOWED_HOSTS" in refused(response, 400, "invalid_request")
