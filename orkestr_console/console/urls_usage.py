"""The addresses of the usage pages."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import usage_views

urlpatterns: list[URLPattern] = [
    path("team/usage/", usage_views.team_usage, name="usage"),
    path("team/usage/csv/", usage_views.team_usage_csv, name="usage_csv"),
]
