"""Templates under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.decorators import methods
from templates_app import api

urlpatterns = [
    path("templates", methods(GET=api.list_templates, POST=api.create_template)),
    path("templates/<str:template_id>", methods(GET=api.get_template, DELETE=api.delete_template)),
]
