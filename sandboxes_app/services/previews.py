"""Previews: a port of a sandbox, by a host name of its own.

Their requests come through the front (:mod:`orkestr_console.previews`), which asks here which
sandbox a name means, whether it is there, and for a connection to it.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Collection
from enum import Enum

from django.conf import settings

from hostruntime import errors as host_errors
from hostruntime.client.ports import open_port
from orkestr_console.accounts.actor import READ, WRITE, Actor, system_actor
from orkestr_console.core.errors import Conflict, Forbidden, InvalidInput, Unsupported
from orkestr_console.core.hosts import Steps, in_steps, translate_error
from orkestr_console.core.preview_base import MAX_PORT, PreviewBase
from orkestr_console.core.rows import fetch
from orkestr_console.http.threads import in_thread
from sandboxes_app.models import Sandbox
from sandboxes_app.services import waking
from sandboxes_app.services.lifecycle import find, require_allowed

# What the public API's SDK puts into an address.
TOKEN_PARAMETER = "ork_preview_token"  # noqa: S105 - a name
NO_NETWORK = (
    "A sandbox without a network has no previews; create one with network restricted or open."
)


def preview_token(sandbox: Sandbox) -> str:
    """The token of one sandbox, derived from the installation's pepper, so that none is stored."""
    return derive(f"preview:{sandbox.pk}")


def shown_token(actor: Actor, sandbox: Sandbox) -> str | None:
    """The token for who may use the sandbox; None for others, and for a public preview.

    A preview can do whatever the program in the sandbox lets its visitors do.
    """
    if not sandbox.preview_auth or not actor.has(WRITE):
        return None
    try:
        require_allowed(actor, sandbox)
    except Forbidden:
        return None
    return preview_token(sandbox)


def preview_cookie(sandbox: Sandbox, port: int) -> str:
    """What a browser has once it has shown the token: good for one port, and not the token."""
    return derive(f"preview-cookie:{sandbox.pk}:{port}")


def derive(message: str) -> str:
    """A secret of ours for one purpose (HMAC-SHA256)."""
    return hmac.new(settings.TOKEN_PEPPER.encode(), message.encode(), hashlib.sha256).hexdigest()


# For the team ------------------------------------------------------------------------------------


@in_steps
def get_preview_host(actor: Actor, sandbox_id: str, port: str | int | None) -> Steps[str]:
    """The host name of a port; whether anything listens there, only a request shows.

    Raises ``NotFound``, ``InvalidInput`` (no port), ``Conflict`` (it has no network, or has ended),
    ``Unsupported`` (this installation serves no previews).
    """
    actor.require(READ)
    number = read_port(port)
    sandbox = yield from find.steps(actor, sandbox_id)
    require_allowed(actor, sandbox)
    base: PreviewBase | None = settings.PREVIEW_BASE
    if base is None:
        raise Unsupported("This server does not offer previews.")
    if sandbox.network == "off":
        raise Conflict(NO_NETWORK, code="preview_unavailable")
    if sandbox.state.is_terminal:
        raise Conflict("The sandbox has ended; create another one.", code="sandbox_not_running")
    return base.host(sandbox.pk, number)


def preview_address(sandbox: Sandbox, host: str, token: str | None = None) -> str:
    """The address of a host of a sandbox, for a browser; with a token if there is one."""
    base: PreviewBase | None = settings.PREVIEW_BASE
    address = f"{'http' if base is None else base.scheme}://{host}/"
    return f"{address}?{TOKEN_PARAMETER}={token}" if token else address


def read_port(port: str | int | None) -> int:
    """Raises ``InvalidInput``."""
    text = "" if port is None else str(port)
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_PORT))
    if not is_number or not 0 < int(text) <= MAX_PORT:
        sentence = f"must be a port number from 1 to {MAX_PORT}."
        raise InvalidInput(f"port: {sentence}", fields={"port": sentence})
    return int(text)


def preview_host_base(sandbox: Sandbox) -> str | None:
    """The part of its hosts that is the same for each port; None if it has no previews."""
    base: PreviewBase | None = settings.PREVIEW_BASE
    return None if base is None or sandbox.network == "off" else base.suffix(sandbox.pk)


# For the front -----------------------------------------------------------------------------------


async def find_previewed(sandbox_id: str) -> Sandbox | None:
    """The row of a sandbox that visitors may come to; None if it has no previews or has ended."""
    sandbox = await in_thread(fetch, Sandbox, "id = %(id)s", {"id": sandbox_id})
    if sandbox is None or sandbox.network == "off" or sandbox.state.is_terminal:
        return None
    return sandbox


class Unreached(Enum):
    """Why there is no connection to a port."""

    CLOSED = "nothing listens"
    PAUSED = "the sandbox is paused, or just being paused"
    GONE = "the sandbox has ended"


async def connect_to_port(sandbox: Sandbox, port: int) -> socket.socket | Unreached:
    """A connection to a port of it, which the caller closes.

    Raises ``HostUnavailable`` and other domain errors.
    """
    try:
        return await open_port(settings.HOST_SOCKET, sandbox.pk, port)
    except host_errors.PortClosed:
        return Unreached.CLOSED
    except host_errors.ContainerPaused:
        return Unreached.PAUSED
    except (host_errors.NotFound, host_errors.ContainerGone):
        return Unreached.GONE
    except host_errors.HostError as error:
        raise translate_error(error) from error


async def wake_for_visitor(sandbox: Sandbox) -> None:
    """Resume a sandbox that wakes by itself. Raises ``PlanLimit`` and ``HostUnavailable``."""
    team = await in_thread(lambda: sandbox.team)
    await waking.wake(system_actor(team), sandbox.pk)


def ended_among(sandbox_ids: Collection[str]) -> set[str]:
    """Those of some sandboxes that have ended, or are gone."""
    live = Sandbox.objects.live().filter(pk__in=sandbox_ids).values_list("pk", flat=True)
    return set(sandbox_ids) - set(live)
