"""Templates under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.http.decorators import methods
from templates_app import api

one = "templates/<str:template_id>"

urlpatterns = [
    path("templates", methods(GET=api.list_templates, POST=api.create_template)),
    path(one, methods(GET=api.get_template, DELETE=api.delete_template)),
    path(f"{one}/cancel", methods(POST=api.cancel_template)),
    path(f"{one}/events", methods(GET=api.list_events)),
    path(f"{one}/contents", methods(GET=api.get_contents)),
    path(f"{one}/log", methods(GET=api.get_log)),
]
