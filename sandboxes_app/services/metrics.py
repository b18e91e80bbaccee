"""What a sandbox uses now, lately, and has used since it was created."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from django.utils import timezone

from hostruntime import errors as host_errors
from hostruntime.client.host_client import HostClient
from hostruntime.wire.sandboxes import MetricsPoint, SandboxMetrics
from orkestr_console.accounts.actor import READ, Actor
from orkestr_console.core.errors import InvalidInput
from orkestr_console.core.hosts import Steps, ask, in_steps, translate_error
from sandboxes_app.models import Sandbox
from sandboxes_app.services.lifecycle import find

# More than any clock shows.
MAX_UNIX_TIME = 2**40
# The samples of so many seconds are exact; before them there are points.
WINDOW_SECONDS = 60


@dataclass(frozen=True)
class Metrics:
    """A sandbox's row, and what its host has measured; nothing unless it is there now.

    ``since`` is the Unix time of the last sample that the caller knows; if that is longer ago than
    the samples reach, ``points`` has what was before them.
    """

    sandbox: Sandbox
    at: datetime
    measured: SandboxMetrics | None
    since: float
    points: Sequence[MetricsPoint] = ()


@in_steps
def get_metrics(actor: Actor, sandbox_id: str, since: str | None = None) -> Steps[Metrics]:
    """The measurements, with the samples after ``since``, in whole Unix seconds.

    Without it they are those of the last minute. With it they go back as far as it says, also for
    a sandbox that ended within the last day. Raises ``NotFound``, ``InvalidInput``,
    ``HostUnavailable``. That a sandbox is paused or has ended is no error.
    """
    actor.require(READ)
    after = read_since(since)
    sandbox = yield from find.steps(actor, sandbox_id)
    measured: SandboxMetrics | None = None
    points: list[MetricsPoint] = []
    now = timezone.now()
    try:
        if since and (sandbox.state.is_terminal or after < now.timestamp() - WINDOW_SECONDS):
            points = yield from ask(HostClient.metrics_history, sandbox.pk, after)
        if not sandbox.state.is_terminal:
            measured = yield from ask(HostClient.metrics, sandbox.pk)
    except (host_errors.NotFound, host_errors.ContainerGone):
        # It is starting, or has just ended.
        measured = None
    except host_errors.HostError as error:
        raise translate_error(error) from error
    return Metrics(sandbox, now, measured, after, points)


def read_since(text: str | None) -> float:
    """Raises ``InvalidInput``."""
    if not text:
        return 0.0
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_UNIX_TIME))
    if not is_number or int(text) > MAX_UNIX_TIME:
        sentence = "must be a Unix time in whole seconds."
        raise InvalidInput(f"since: {sentence}", fields={"since": sentence})
    return float(text)
