"""The document over REST."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, HttpResponseNotModified

from orkestr_console.http.describing import JSON, describe
from orkestr_console.openapi.document import encoded


@describe(
    "Get this document",
    notes="OpenAPI 3.1. It needs no token, and has an entity tag for `If-None-Match`.",
    also={JSON: {"type": "object", "required": ["openapi", "paths"]}},
    statuses={304: "It is still the same."},
    extension=True,
)
def get_document(request: HttpRequest) -> HttpResponse:
    """``GET /v1/openapi.json``: public, as it says nothing of anybody."""
    content, tag = encoded()
    headers = {"ETag": tag, "Cache-Control": "public, max-age=60"}
    if request.headers.get("If-None-Match") == tag:
        return HttpResponseNotModified(headers=headers)
    return HttpResponse(content, content_type=JSON, headers=headers)
