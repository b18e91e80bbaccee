"""The addresses of the live template pages."""

from __future__ import annotations

from django.urls import URLPattern

from orkestr_console.ui.live import live_page
from templates_app.consumers import TemplateListPage, TemplatePage

websocket_urlpatterns: list[URLPattern] = [
    live_page("ws/templates/", TemplateListPage),
    live_page("ws/templates/<str:template_id>/", TemplatePage),
]
