"""The Django app of people, teams, plans and tokens."""

from __future__ import annotations

from django.apps import AppConfig


class AccountsConfig(AppConfig):
    """Labelled ``accounts``, as AUTH_USER_MODEL and other apps' foreign keys name it."""

    name = "orkestr_console.accounts"
    label = "accounts"
    default_auto_field = "django.db.models.BigAutoField"
