"""The addresses of the console's sandbox pages."""

from __future__ import annotations

from django.urls import path

from sandboxes_app import command_views, preview_views, snapshot_views, views, volume_views

app_name = "sandboxes"

urlpatterns = [
    path("", views.sandbox_list, name="list"),
    path("new/", views.sandbox_new, name="new"),
    path("of-template/<str:template_id>/", views.template_use, name="of-template"),
    path("volumes/", volume_views.volumes_page, name="volumes"),
    path("volumes/<str:volume_id>/delete/", volume_views.volume_delete, name="volume_delete"),
    path("snapshots/", snapshot_views.snapshots_page, name="snapshots"),
    path("snapshots/<str:snapshot_id>/", snapshot_views.snapshot_detail, name="snapshot"),
    path(
        "snapshots/<str:snapshot_id>/start/", snapshot_views.snapshot_start, name="snapshot_start"
    ),
    path(
        "snapshots/<str:snapshot_id>/delete/",
        snapshot_views.snapshot_delete,
        name="snapshot_delete",
    ),
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
    path("<str:sandbox_id>/preview/", preview_views.sandbox_preview, name="preview"),
    path("<str:sandbox_id>/egress/", views.sandbox_egress, name="egress"),
    path("<str:sandbox_id>/use/", views.sandbox_use, name="use"),
    path("<str:sandbox_id>/pause/", views.sandbox_pause, name="pause"),
    path("<str:sandbox_id>/resume/", views.sandbox_resume, name="resume"),
    path("<str:sandbox_id>/snapshot/", snapshot_views.snapshot_new, name="snapshot_new"),
    path("<str:sandbox_id>/terminate/", views.sandbox_terminate, name="terminate"),
]
