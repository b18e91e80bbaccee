"""The address of the page that connects an agent."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import connect_views

urlpatterns: list[URLPattern] = [
    path("connect/", connect_views.connect_page, name="connect"),
]
