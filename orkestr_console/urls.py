"""Every address: REST under ``/v1``, account calls under ``/api``, the console, and health."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver, include, path, re_path

from orkestr_console.http import health

# REST first: its catch-all answers JSON for whatever under /v1 no app knows.
# Webhooks before sandboxes: their address would be that of one called "webhooks".
REST = (
    "orkestr_console.openapi.urls_api",
    "templates_app.urls_api",
    "orkestr_console.webhooks.urls_api",
    "sandboxes_app.urls_api",
)
CONSOLE = {
    "orkestr_console.console.urls": "",
    "templates_app.urls": "templates/",
    "sandboxes_app.urls": "sandboxes/",
}


urlpatterns: list[URLPattern | URLResolver] = [
    path("healthz", health.healthz),
    path("readyz", health.readyz),
    *(path("v1/", include(module)) for module in REST),
    re_path(r"^v1(?:/.*)?$", health.unknown_route),
    path("api/", include("orkestr_console.console.urls_api")),
    re_path(r"^api(?:/.*)?$", health.unknown_route),
    *(path(prefix, include(module)) for module, prefix in CONSOLE.items()),
]

handler400 = "orkestr_console.http.health.bad_request"
handler403 = "orkestr_console.http.health.forbidden"
handler404 = "orkestr_console.http.health.not_found"
handler500 = "orkestr_console.http.health.server_error"
