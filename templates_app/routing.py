"""The addresses of the live template pages."""

from __future__ import annotations

from typing import Any

from django.urls import path

from templates_app.consumers import TemplateListPage, TemplatePage

websocket_urlpatterns: list[Any] = [
    path("ws/templates/", TemplateListPage.as_asgi()),
    path("ws/templates/<str:template_id>/", TemplatePage.as_asgi()),
]
