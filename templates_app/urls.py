"""The addresses of the console's template pages."""

from __future__ import annotations

from django.urls import path

from templates_app import contents_views, output_views, views

app_name = "templates"

template_path = "<str:template_id>"

urlpatterns = [
    path("", views.template_list, name="list"),
    path("new/", views.template_new, name="new"),
    path("compare/", contents_views.template_compare, name="compare"),
    path(f"{template_path}/", views.template_detail, name="detail"),
    path(f"{template_path}/delete/", views.template_delete, name="delete"),
    path(f"{template_path}/cancel/", views.template_cancel, name="cancel"),
    path(f"{template_path}/again/", views.template_rebuild, name="again"),
    path(f"{template_path}/contents/", contents_views.template_contents, name="contents"),
    path(f"{template_path}/log/", output_views.download_log, name="log"),
    path(f"{template_path}/search/", output_views.search, name="search"),
    path(f"{template_path}/steps/<int:number>/output/", output_views.step_output, name="output"),
    path(f"{template_path}/steps/<int:number>/lines/", output_views.step_lines, name="lines"),
]
