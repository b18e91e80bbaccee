"""The addresses of the live sandbox pages."""

from __future__ import annotations

from django.urls import URLPattern

from orkestr_console.ui.live import live_page
from sandboxes_app.consumers import SandboxListPage, SandboxPage

websocket_urlpatterns: list[URLPattern] = [
    live_page("ws/sandboxes/", SandboxListPage),
    live_page("ws/sandboxes/<str:sandbox_id>/", SandboxPage),
]
