"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class TemplatesConfig(AppConfig):
    """Templates and their builds."""

    name = "templates_app"
    verbose_name = "Templates"
