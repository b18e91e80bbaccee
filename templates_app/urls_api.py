"""Templates under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.http.decorators import methods
from templates_app import api

template_path = "templates/<str:template_id>"

urlpatterns = [
    path("bases", methods(GET=api.list_bases)),
    path("templates", methods(GET=api.list_templates, POST=api.create_template)),
    path(template_path, methods(GET=api.get_template, DELETE=api.delete_template)),
    path(f"{template_path}/cancel", methods(POST=api.cancel_template)),
    path(f"{template_path}/events", methods(GET=api.list_events)),
    path(f"{template_path}/contents", methods(GET=api.get_contents)),
    path(f"{template_path}/log", methods(GET=api.get_log)),
]
