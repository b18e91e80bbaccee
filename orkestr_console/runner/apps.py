"""The Django app that carries the operator's commands: up, down, doctor, selfcheck."""

from __future__ import annotations

from django.apps import AppConfig


class RunnerConfig(AppConfig):
    """No models: only management commands."""

    name = "orkestr_console.runner"
    label = "runner"
