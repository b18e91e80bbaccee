"""The document under ``/v1``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.http.decorators import methods
from orkestr_console.openapi import api

urlpatterns = [path("openapi.json", methods(GET=api.get_document))]
