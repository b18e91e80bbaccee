"""The Django app that knows which installation's database this is."""

from __future__ import annotations

from django.apps import AppConfig


class InstallationConfig(AppConfig):
    """One row, and the operator's commands about what was set aside."""

    name = "orkestr_console.installation"
    label = "installation"
    default_auto_field = "django.db.models.BigAutoField"
