"""The addresses of the console's template pages."""

from __future__ import annotations

from django.urls import path

from templates_app import views

app_name = "templates"

urlpatterns = [
    path("", views.template_list, name="list"),
    path("new/", views.template_new, name="new"),
    path("<str:template_id>/", views.template_detail, name="detail"),
    path("<str:template_id>/delete/", views.template_delete, name="delete"),
    path("<str:template_id>/steps/<int:number>/output/", views.step_output, name="output"),
]
