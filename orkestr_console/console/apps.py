"""The Django app of the console's frame."""

from __future__ import annotations

from django.apps import AppConfig


class ConsoleConfig(AppConfig):
    """No models: views, template tags and templates."""

    name = "orkestr_console.console"
    label = "console"
