"""The addresses of the console's sandbox pages."""

from __future__ import annotations

from django.urls import path

from sandboxes_app import command_views, views

app_name = "sandboxes"

urlpatterns = [
    path("", views.sandbox_list, name="list"),
    path("new/", views.sandbox_new, name="new"),
    path("of-template/<str:template_id>/", views.template_use, name="of-template"),
    path("<str:sandbox_id>/", views.sandbox_detail, name="detail"),
    path("<str:sandbox_id>/exec/", views.sandbox_exec, name="exec"),
    path("<str:sandbox_id>/commands/", command_views.command_list, name="commands"),
    path(
        "<str:sandbox_id>/commands/<str:command_id>/", command_views.command_detail, name="command"
    ),
    path(
        "<str:sandbox_id>/commands/<str:command_id>/output/",
        command_views.command_output,
        name="command-output",
    ),
    path(
        "<str:sandbox_id>/commands/<str:command_id>/stop/",
        command_views.command_stop,
        name="command-stop",
    ),
    path("<str:sandbox_id>/egress/", views.sandbox_egress, name="egress"),
    path("<str:sandbox_id>/pause/", views.sandbox_pause, name="pause"),
    path("<str:sandbox_id>/resume/", views.sandbox_resume, name="resume"),
    path("<str:sandbox_id>/terminate/", views.sandbox_terminate, name="terminate"),
]
