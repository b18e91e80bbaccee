"""The addresses of the pages about limits and tokens, and of the operator's."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import limits_views, operator_storage, operator_views, token_views

urlpatterns: list[URLPattern] = [
    path("team/limits/", limits_views.limits_page, name="limits"),
    path("team/tokens/", token_views.tokens_page, name="tokens"),
    path("team/tokens/<str:token_id>/revoke/", token_views.token_revoke, name="token_revoke"),
    path("operator/", operator_views.operator_page, name="operator"),
    path("operator/teams/new/", operator_views.operator_team_new, name="operator_team_new"),
    path("operator/teams/<str:team_id>/", operator_views.operator_team, name="operator_team"),
    path("operator/plans/<str:code>/", operator_views.operator_plan, name="operator_plan"),
    path("operator/storage/", operator_storage.storage_page, name="operator_storage"),
    path(
        "operator/storage/accept/", operator_storage.storage_accept, name="operator_storage_accept"
    ),
    path(
        "operator/storage/<str:key>/restore/",
        operator_storage.storage_restore,
        name="operator_storage_restore",
    ),
    path(
        "operator/storage/<str:key>/delete/",
        operator_storage.storage_delete,
        name="operator_storage_delete",
    ),
]
