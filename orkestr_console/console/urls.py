"""The addresses of no app: ``/``, signing in and out."""

from __future__ import annotations

from django.urls import path

from orkestr_console.console import views

app_name = "console"

urlpatterns = [
    path("", views.home, name="home"),
    path("sign-in/", views.sign_in, name="sign_in"),
    path("sign-out/", views.sign_out, name="sign_out"),
]
