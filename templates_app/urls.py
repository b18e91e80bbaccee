"""The addresses of the console's template pages."""

from __future__ import annotations

from django.urls import path

from templates_app import contents_views, output_views, views

app_name = "templates"

one = "<str:template_id>"

urlpatterns = [
    path("", views.template_list, name="list"),
    path("new/", views.template_new, name="new"),
    path("compare/", contents_views.template_compare, name="compare"),
    path(f"{one}/", views.template_detail, name="detail"),
    path(f"{one}/delete/", views.template_delete, name="delete"),
    path(f"{one}/cancel/", views.template_cancel, name="cancel"),
    path(f"{one}/again/", views.template_again, name="again"),
    path(f"{one}/contents/", contents_views.template_contents, name="contents"),
    path(f"{one}/log/", output_views.whole_log, name="log"),
    path(f"{one}/search/", output_views.search, name="search"),
    path(f"{one}/steps/<int:number>/output/", output_views.step_output, name="output"),
    path(f"{one}/steps/<int:number>/lines/", output_views.step_lines, name="lines"),
]
