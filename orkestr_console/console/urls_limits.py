"""The addresses of the pages about limits and tokens, and of the operator's."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import limits_views, operator_views, token_views

urlpatterns: list[URLPattern] = [
    path("team/limits/", limits_views.limits_page, name="limits"),
    path("team/tokens/", token_views.tokens_page, name="tokens"),
    path("team/tokens/<str:token_id>/revoke/", token_views.token_revoke, name="token_revoke"),
    path("operator/", operator_views.operator_page, name="operator"),
    path("operator/teams/new/", operator_views.operator_team_new, name="operator_team_new"),
    path("operator/teams/<str:team_id>/", operator_views.operator_team, name="operator_team"),
    path("operator/plans/<str:code>/", operator_views.operator_plan, name="operator_plan"),
]
