"""The account calls of the official command line: who one is, one's tokens, and signing in.

Their addresses and answers are the client's (:mod:`tests.clients.test_cli_account`).
"""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse
from django.urls import reverse

from orkestr_console.accounts import device_login, own_tokens
from orkestr_console.accounts.actor import READ
from orkestr_console.accounts.device_login import DevicePollSpec, DeviceStartSpec, SignedIn
from orkestr_console.accounts.models import ApiToken
from orkestr_console.accounts.own_tokens import OwnTokenSpec
from orkestr_console.accounts.sessions import client_address
from orkestr_console.console.account_answers import (
    Account,
    CreatedToken,
    DeviceToken,
    StartedDeviceLogin,
    TokenList,
    TokenRow,
)
from orkestr_console.core.addresses import console_address
from orkestr_console.core.errors import Conflict, RateLimited
from orkestr_console.http.decorators import ApiRequest, api
from orkestr_console.http.describing import describe
from orkestr_console.http.json_api import json_response, no_content, read_json, timestamp

# What anybody may send: a name or a code.
SMALL_BODY = 4096
NO_STORE = {"Cache-Control": "no-store"}


@describe("Show who is calling", answer=Account)
@api(scope=READ)
def get_account(request: ApiRequest) -> HttpResponse:
    """``GET /api/auth/me``: the token's person, or the token itself if an operator made it."""
    actor = request.actor
    token = own_tokens.calling_token(actor)
    person = actor.user
    shown: Account = {
        "username": person.get_full_name() if person else token.name,
        "email": person.email if person else None,
        "plan": actor.team.plan.code,
        "is_active": person.is_active if person else True,
        "created_at": timestamp(person.created_at if person else token.created_at),
        "team": {"id": actor.team.pk, "name": actor.team.name},
        "token": token_row(token),
    }
    return json_response(shown)


@describe("List one's tokens", answer=TokenList)
@api(scope=READ)
def list_tokens(request: ApiRequest) -> HttpResponse:
    """``GET /api/v1/api-tokens``."""
    listed = [token_row(token) for token in own_tokens.list_own(request.actor)]
    return json_response(TokenList(tokens=listed))


@describe(
    "Create a token",
    notes="The only answer with its text.",
    body=OwnTokenSpec,
    example={"name": "laptop", "expires_in_days": 30},
    answer=CreatedToken,
    status=201,
    errors=(Conflict,),
)
@api(scope=READ)
def create_token(request: ApiRequest) -> HttpResponse:
    """``POST /api/v1/api-tokens``: the answer has the token's text, once."""
    spec = read_json(request, OwnTokenSpec, max_bytes=SMALL_BODY)
    token, text = own_tokens.create_own(request.actor, spec)
    created = CreatedToken(**token_row(token), token=text)
    return json_response(created, status=201, headers=NO_STORE)


def token_row(token: ApiToken) -> TokenRow:
    """A token without its secret; its id is the part of it that lists show."""
    return {
        "id": token.lookup,
        "name": token.name,
        "scopes": token.scopes,
        "created_at": timestamp(token.created_at),
        "expires_at": timestamp(token.expires_at),
        "last_used_at": timestamp(token.last_used_at),
    }


@describe("Revoke a token", notes="Once more is no error.", status=204)
@api(scope=READ)
def delete_token(request: ApiRequest, token_id: str) -> HttpResponse:
    """``DELETE /api/v1/api-tokens/{id}``: idempotent."""
    own_tokens.revoke_own(request.actor, token_id)
    return no_content()


@describe("Revoke the calling token", status=204)
@api(scope=READ)
def delete_current_token(request: ApiRequest) -> HttpResponse:
    """``DELETE /api/api-tokens/current``: the calling token ends."""
    own_tokens.sign_off(request.actor)
    return no_content()


@describe(
    "Begin to sign in",
    notes="RFC 8628: a person approves it in a browser.",
    body=DeviceStartSpec,
    example={"client_name": "my-tool"},
    answer=StartedDeviceLogin,
    errors=(RateLimited,),
)
def start_device_login(request: HttpRequest) -> HttpResponse:
    """``POST /api/auth/device/start``: without a token; RFC 8628, 3.2."""
    spec = read_json(request, DeviceStartSpec, max_bytes=SMALL_BODY)
    started = device_login.start(spec, client_address(request))
    page = console_address(request) + reverse("console:device")
    login: StartedDeviceLogin = {
        "device_code": started.device_code,
        "user_code": started.user_code,
        "verification_uri": page,
        "verification_uri_complete": f"{page}?code={started.user_code}",
        "interval": device_login.INTERVAL,
        "expires_in": int(device_login.LIFETIME.total_seconds()),
    }
    return json_response(login, headers=NO_STORE)


@describe(
    "Ask for the token of a login",
    notes="400 until a person has approved it, with an `error` of RFC 8628, 3.5.",
    body=DevicePollSpec,
    example={"device_code": "the device_code of the login"},
    answer=DeviceToken,
    errors=(RateLimited,),
)
def poll_device_login(request: HttpRequest) -> HttpResponse:
    """``POST /api/auth/device/token``: the token, once; else RFC 8628's error (3.5)."""
    spec = read_json(request, DevicePollSpec, max_bytes=SMALL_BODY)
    result = device_login.poll(spec, client_address(request))
    if not isinstance(result, SignedIn):
        detail = device_login.POLL_DETAILS[result]
        refusal = {"error": result, "detail": detail, "code": result}
        return json_response(refusal, status=400, headers=NO_STORE)
    person = result.token.created_by
    token: DeviceToken = {
        "token": result.text,
        "name": result.token.name,
        "username": person.get_full_name() if person else result.token.name,
        "scopes": " ".join(result.token.scopes),
        "expires_at": timestamp(result.token.expires_at),
    }
    return json_response(token, headers=NO_STORE)
