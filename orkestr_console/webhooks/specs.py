"""The request model for webhooks: strict, and shared by console and REST."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from hostruntime.network.policy import canonical_host
from orkestr_console.webhooks.addresses import DEFAULT_PORTS
from orkestr_console.webhooks.models import MAX_URL_LENGTH

type EventName = Literal[
    "sandbox.created",
    "sandbox.paused",
    "sandbox.resumed",
    "sandbox.terminated",
    "sandbox.expired",
    "template.build_finished",
    "volume.moved",
    "volume.expired",
]
FIRST_PRINTABLE, LAST_PRINTABLE = "!", "~"


def usable_url(url: str) -> str:
    """An http or https address that a request can be made of as it is."""
    if len(url) > MAX_URL_LENGTH:
        raise ValueError(f"must have at most {MAX_URL_LENGTH:,} characters; this has {len(url):,}.")
    if not all(FIRST_PRINTABLE <= character <= LAST_PRINTABLE for character in url):
        raise ValueError(
            "must have no spaces and only ASCII characters: write an international host name as "
            "'xn--…', and percent-encode the rest."
        )
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("is not a valid address.") from None
    if parts.scheme not in DEFAULT_PORTS or not host:
        raise ValueError("must start with 'https://' or 'http://', followed by a host name.")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not contain a user name or password; verify the signature instead.")
    if parts.fragment:
        raise ValueError("must not have a part after '#'; it would not be sent.")
    if port == 0 or not (is_address(host) or canonical_host(host)):
        raise ValueError("is not a valid address: check its host name and port.")
    return url


def is_address(host: str) -> bool:
    """Whether a host is an IP address, in its usual form."""
    try:
        return bool(ip_address(host))
    except ValueError:
        return False


def without_repeats(names: list[EventName] | None) -> list[EventName] | None:
    """The same events, each once."""
    return None if names is None else list(dict.fromkeys(names))


class WebhookSpec(BaseModel):
    """A webhook to create."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    url: Annotated[str, AfterValidator(usable_url)] = Field(
        description="Where events are posted to: a public http or https address."
    )
    event_types: (
        Annotated[list[EventName], Field(min_length=1), AfterValidator(without_repeats)] | None
    ) = Field(default=None, description="The events to send; all of them if left out.")
