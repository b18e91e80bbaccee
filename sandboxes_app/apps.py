"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class SandboxesConfig(AppConfig):
    """Sandboxes and their history."""

    name = "sandboxes_app"
    verbose_name = "Sandboxes"
