"""Where HTTP and WebSockets come in: Django for HTTP, the apps' consumers for WebSockets."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from django.core.asgi import get_asgi_application
from django.urls import re_path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orkestr_console.settings")

# Loads the apps, which the consumers' modules need.
http = get_asgi_application()


def websocket_urls() -> list[Any]:
    """The ``websocket_urlpatterns`` of each app's ``routing`` module."""
    modules = [f"{app}.routing" for app in ("templates_app", "sandboxes_app")]
    return [
        url
        for module in modules
        if find_spec(module) is not None
        for url in import_module(module).websocket_urlpatterns
    ]


async def nowhere(scope: Any, receive: Any, send: Any) -> None:
    """Refuse a socket at an address that there is not, before the handshake: no error of ours."""
    await receive()
    await send({"type": "websocket.close"})


# Channels routes with Django's patterns, whose types know only views.
anything_else: Any = nowhere

application = ProtocolTypeRouter(
    {
        "http": http,
        "websocket": AuthMiddlewareStack(
            URLRouter([*websocket_urls(), re_path("", anything_else)])
        ),
    }
)
