"""The console's own addresses, for links and examples that people copy."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest

MCP_PATH = "/api/sandboxes/mcp"


def console_address(request: HttpRequest) -> str:
    """``https://console.example``, with no slash at its end.

    What the operator has set, else how the request calls us: a name of ``ALLOWED_HOSTS``, but with
    any port. So an installation that others can reach should set ``ORKESTR_PUBLIC_URL``.
    """
    if settings.PUBLIC_URL_IS_SET:
        return str(settings.PUBLIC_URL)
    return f"{request.scheme}://{request.get_host()}"
