"""What a sandbox uses now, lately, and has used since it was created."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.sandboxes import SandboxMetrics
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.hosts import Steps, ask, in_steps, translate_error
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import find

# More than any clock shows.
MAX_UNIX_TIME = 2**40


@dataclass(frozen=True)
class Metrics:
    """A sandbox's row, and what its host has measured; nothing unless it is there now.

    ``since`` is the Unix time of the last sample that the caller knows.
    """

    sandbox: Sandbox
    at: datetime
    measured: SandboxMetrics | None
    since: float


@in_steps
def get_metrics(actor: Actor, sandbox_id: str, since: str | None = None) -> Steps[Metrics]:
    """The measurements, with the samples after ``since``, in whole Unix seconds.

    Raises ``NotFound``, ``InvalidInput``, ``HostUnavailable``. That a sandbox is paused or has
    ended is no error.
    """
    actor.require(READ)
    after = read_since(since)
    sandbox = yield from find.steps(actor, sandbox_id)
    measured: SandboxMetrics | None = None
    if not sandbox.state.is_terminal:
        try:
            measured = yield from ask(HostClient.metrics, sandbox.pk)
        except (host_errors.NotFound, host_errors.ContainerGone):
            # It is starting, or has just ended.
            measured = None
        except host_errors.HostError as error:
            raise translate_error(error) from error
    return Metrics(sandbox, timezone.now(), measured, after)


def read_since(text: str | None) -> float:
    """Raises ``InvalidInput``."""
    if not text:
        return 0.0
    if not (text.isascii() and text.isdigit()) or int(text[:20]) > MAX_UNIX_TIME:
        sentence = "must be a Unix time in whole seconds."
        raise InvalidInput(f"since: {sentence}", fields={"since": sentence})
    return float(text)
