"""Where HTTP and WebSockets come in: Django and MCP for HTTP, the apps' consumers for sockets."""

from __future__ import annotations

import asyncio
import os
from importlib import import_module
from typing import Any

import django
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.urls import re_path

from orkestr_console.core.addresses import MCP_PATH
from orkestr_console.core.channel_layer import SERVICE_RESTART
from orkestr_console.core.listening import TrustedProxies
from orkestr_console.core.postgres import unavailable
from orkestr_console.http.handler import Handler

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orkestr_console.settings")

# The apps are loaded before the consumers' modules and the middleware, which need them.
django.setup(set_prefix=False)
http = Handler()


def websocket_urls() -> list[Any]:
    """The ``websocket_urlpatterns`` of each app's ``routing`` module."""
    modules = [f"{app}.routing" for app in ("templates_app", "sandboxes_app")]
    return [url for module in modules for url in import_module(module).websocket_urlpatterns]


async def by_path(scope: Any, receive: Any, send: Any) -> None:
    """MCP at its address, Django at every other."""
    if scope["path"].rstrip("/") != MCP_PATH:
        await http(scope, receive, send)
        return
    # Its SDK takes a second to import, which a start of the console need not wait for.
    module = await asyncio.to_thread(import_module, "orkestr_console.mcp.endpoint")
    await module.endpoint(scope, receive, send)


async def nowhere(scope: Any, receive: Any, send: Any) -> None:
    """Refuse a socket at an address that there is not, before the handshake: no error of ours."""
    await receive()
    await send({"type": "websocket.close"})


class Sockets:
    """The sockets; while the database is away they are closed as by a restart: pages come back."""

    def __init__(self, routed: Any) -> None:
        self._routed = routed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one (ASGI)."""
        try:
            await self._routed(scope, receive, send)
        except Exception as error:
            # The channel layer says with a TimeoutError that nothing can be heard.
            if not isinstance(error, TimeoutError) and unavailable(error) is None:
                raise
            await send({"type": "websocket.close", "code": SERVICE_RESTART})


# Channels routes with Django's patterns, whose types know only views.
anything_else: Any = nowhere

protocols: Any = ProtocolTypeRouter(
    {
        "http": by_path,
        "websocket": Sockets(
            AuthMiddlewareStack(URLRouter([*websocket_urls(), re_path("", anything_else)]))
        ),
    }
)
# Before everything, so that HTTP, MCP and WebSockets are told the same.
application = TrustedProxies(protocols, settings.TRUSTED_PROXIES)
