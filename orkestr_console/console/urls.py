"""The addresses of the pages that belong to no app."""

from __future__ import annotations

from django.urls import path

from orkestr_console.console import (
    account_views,
    audit_views,
    connect_views,
    device_views,
    limits_views,
    operator_storage,
    operator_views,
    people_views,
    reference_views,
    token_views,
    usage_views,
    views,
    webhook_views,
)

app_name = "console"

urlpatterns = [
    path("", views.home, name="home"),
    path("sign-in/", views.sign_in, name="sign_in"),
    path("sign-out/", views.sign_out, name="sign_out"),
    path("sign-in/code/", views.sign_in_code, name="sign_in_code"),
    path("join/<str:secret>/", people_views.join, name="join"),
    path("team/switch/", people_views.switch_team, name="switch_team"),
    path("teams/", people_views.teams_page, name="teams"),
    path("team/people/", people_views.people_page, name="people"),
    path("team/people/<int:user_id>/", people_views.person_page, name="person"),
    path("team/people/<int:user_id>/remove/", people_views.person_remove, name="person_remove"),
    path(
        "team/invitations/<str:invitation_id>/revoke/",
        people_views.invitation_revoke,
        name="invitation_revoke",
    ),
    path("account/", account_views.account_page, name="account"),
    path("account/name/", account_views.account_name, name="account_name"),
    path("account/password/", account_views.account_password, name="account_password"),
    path("account/sessions/<int:session_id>/end/", account_views.session_end, name="session_end"),
    path("account/sessions/end-others/", account_views.sessions_end_others, name="end_others"),
    path("account/code/begin/", account_views.second_factor_begin, name="code_begin"),
    path("account/code/confirm/", account_views.second_factor_confirm, name="code_confirm"),
    path("account/code/off/", account_views.second_factor_off, name="code_off"),
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
    path("team/webhooks/", webhook_views.webhooks_page, name="webhooks"),
    path("team/webhooks/<str:webhook_id>/", webhook_views.webhook_page, name="webhook"),
    path(
        "team/webhooks/<str:webhook_id>/deliveries/",
        webhook_views.webhook_deliveries,
        name="webhook_deliveries",
    ),
    path("team/webhooks/<str:webhook_id>/test/", webhook_views.webhook_test, name="webhook_test"),
    path(
        "team/webhooks/<str:webhook_id>/enable/",
        webhook_views.webhook_enable,
        name="webhook_enable",
    ),
    path(
        "team/webhooks/<str:webhook_id>/delete/",
        webhook_views.webhook_delete,
        name="webhook_delete",
    ),
    path("team/audit/", audit_views.audit_page, name="audit"),
    path("team/audit/csv/", audit_views.audit_csv, name="audit_csv"),
    path("team/audit/jsonl/", audit_views.audit_json, name="audit_json"),
    path("team/usage/", usage_views.team_usage, name="usage"),
    path("team/usage/csv/", usage_views.team_usage_csv, name="usage_csv"),
    path("device/", device_views.device_page, name="device"),
    path("connect/", connect_views.connect_page, name="connect"),
    path("reference/", reference_views.reference_page, name="reference"),
    path("reference/<str:group>/", reference_views.reference_group, name="reference_group"),
]
