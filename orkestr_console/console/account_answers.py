"""The shapes of what the account calls answer; :mod:`…console.account_api` makes them."""

from __future__ import annotations

from typing import Annotated, TypedDict

from pydantic import Field

from orkestr_console.http.json_api import Timestamp


class TeamName(TypedDict):
    """A team."""

    id: str
    name: str


class TokenRow(TypedDict):
    """An API token without its secret; its id is the part of it that lists show."""

    id: str
    name: str
    scopes: list[str]
    created_at: Timestamp
    expires_at: Timestamp | None
    last_used_at: Timestamp | None


class CreatedToken(TokenRow):
    """A new token: the only answer with its text."""

    token: str


class TokenList(TypedDict):
    """The caller's tokens."""

    tokens: list[TokenRow]


class Account(TypedDict):
    """The token's person, or the token itself if an operator made it."""

    username: str
    email: str | None
    plan: str
    is_active: bool
    created_at: Timestamp
    team: TeamName
    token: TokenRow


class StartedDeviceLogin(TypedDict):
    """The codes of a login (RFC 8628, 3.2)."""

    device_code: str
    user_code: str
    verification_uri: str
    verification_uri_complete: str
    interval: Annotated[int, Field(description="Seconds between two questions for the token.")]
    expires_in: int


class DeviceToken(TypedDict):
    """The token of a login that was approved."""

    token: str
    name: str
    username: str
    scopes: Annotated[str, Field(description="Separated by spaces.")]
    expires_at: Timestamp | None
