"""The addresses of the pages about people and accounts."""

from __future__ import annotations

from django.urls import URLPattern, path

from orkestr_console.console import account_views, people_views, views

urlpatterns: list[URLPattern] = [
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
]
