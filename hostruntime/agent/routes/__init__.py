"""The agent's routes, by noun: each reads its request, calls one manager, renders the response.

``health`` (and the egress proxy's decisions), ``images`` (and bases), ``builds``, ``sandboxes``
(with their usage and snapshots), ``volumes``, ``commands``, ``background`` ones, ``interpreter``,
``files``, ``transfers``, ``reconciliation``.  Handlers raise :mod:`hostruntime.errors`, which
:func:`application` turns into responses; once a stream has started, an error can only be a line
in it.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

from hostruntime.agent.host import Host
from hostruntime.agent.reconciliation import Reconciler
from hostruntime.agent.responses import client_disconnected, disk_error, host_error, internal_error
from hostruntime.agent.routes import (
    background,
    builds,
    commands,
    files,
    health,
    images,
    interpreter,
    reconciliation,
    sandboxes,
    transfers,
    volumes,
)
from hostruntime.errors import HostError
from hostruntime.host.installation import InstallationStore


def application(host: Host) -> Starlette:
    """The agent's ASGI application."""
    used = host.sandboxes
    reconciler = Reconciler(InstallationStore(host.paths), host.store, used.snapshots, used.volumes)
    # Tried one after the other: first what is called most.
    routes = [
        *commands.routes(host.sandboxes),
        *sandboxes.routes(host.sandboxes),
        *health.routes(host),
        *images.routes(host.store, host.bases),
        *builds.routes(host.builds),
        *volumes.routes(host.sandboxes.volumes),
        *background.routes(host.sandboxes),
        *interpreter.routes(host.sandboxes),
        *files.routes(host.sandboxes, host.containers.files),
        *transfers.routes(host.sandboxes, host.containers.files),
        *reconciliation.routes(reconciler),
    ]
    handlers = {
        HostError: host_error,
        OSError: disk_error,
        ClientDisconnect: client_disconnected,
        Exception: internal_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers)
