"""The agent's routes, by noun: each reads its request, calls one manager, renders the answer.

``health`` (and what the egress proxy says), ``images`` (and bases), ``builds``, ``sandboxes`` (with
their usage and snapshots), ``commands``, ``files``, ``keeping``.  Handlers raise
:mod:`hostruntime.errors`, which :func:`application` turns into answers; once a stream has begun an
error can only be a line in it.
"""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect

from hostruntime.agent.host import Host
from hostruntime.agent.keeping import Keeping
from hostruntime.agent.responses import defect, disk_error, gone_away, host_error
from hostruntime.agent.routes import builds, commands, files, health, images, keeping, sandboxes
from hostruntime.errors import HostError
from hostruntime.host.installation import InstallationStore


def application(host: Host) -> Starlette:
    """The agent's ASGI application."""
    kept = Keeping(InstallationStore(host.paths), host.store, host.sandboxes.snapshots)
    routes = [
        *health.routes(host),
        *images.routes(host.store, host.bases),
        *builds.routes(host.builds),
        *sandboxes.routes(host.sandboxes),
        *commands.routes(host.sandboxes),
        *files.routes(host.sandboxes, host.containers.files),
        *keeping.routes(kept),
    ]
    handlers = {
        HostError: host_error,
        OSError: disk_error,
        ClientDisconnect: gone_away,
        Exception: defect,
    }
    return Starlette(routes=routes, exception_handlers=handlers)
