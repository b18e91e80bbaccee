"""The addresses of the audit pages."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import audit_views

urlpatterns: list[URLPattern] = [
    path("team/audit/", audit_views.audit_page, name="audit"),
    path("team/audit/csv/", audit_views.audit_csv, name="audit_csv"),
    path("team/audit/jsonl/", audit_views.audit_json, name="audit_json"),
]
