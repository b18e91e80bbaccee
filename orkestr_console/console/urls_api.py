"""The account calls, under ``/api/``."""

from __future__ import annotations

from django.urls import path

from orkestr_console.console import account_api
from orkestr_console.http.decorators import methods

urlpatterns = [
    path("auth/me", methods(GET=account_api.get_account)),
    path("auth/device/start", methods(POST=account_api.start_device_login)),
    path("auth/device/token", methods(POST=account_api.poll_device_login)),
    path(
        "v1/api-tokens",
        methods(GET=account_api.list_tokens, POST=account_api.create_token),
    ),
    path("v1/api-tokens/<str:token_id>", methods(DELETE=account_api.delete_token)),
    path("api-tokens/current", methods(DELETE=account_api.delete_current_token)),
]
