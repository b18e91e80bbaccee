"""The addresses of no app: ``/``, signing in and out, and a team's own pages."""

from __future__ import annotations

from django.urls import path

from orkestr_console.console import (
    urls_audit,
    urls_connect,
    urls_limits,
    urls_people,
    urls_usage,
    views,
)

app_name = "console"

urlpatterns = [
    path("", views.home, name="home"),
    path("sign-in/", views.sign_in, name="sign_in"),
    path("sign-out/", views.sign_out, name="sign_out"),
    *urls_people.urlpatterns,
    *urls_limits.urlpatterns,
    *urls_audit.urlpatterns,
    *urls_usage.urlpatterns,
    *urls_connect.urlpatterns,
]
