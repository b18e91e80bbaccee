"""The console's own addresses, for links and for examples to copy."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest

MCP_PATH = "/api/sandboxes/mcp"


def console_address(request: HttpRequest) -> str:
    """``https://console.example``, without a trailing slash.

    The operator's setting, else the request's own host: a name of ``ALLOWED_HOSTS``, but with any
    port. So an installation that others can reach should set ``ORKESTR_PUBLIC_URL``.
    """
    if settings.PUBLIC_URL_IS_SET:
        return str(settings.PUBLIC_URL)
    return f"{request.scheme}://{request.get_host()}"
