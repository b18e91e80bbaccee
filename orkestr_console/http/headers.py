"""Headers of responses, and the id of a request.

Other sites may not embed our responses (Cross-Origin-Resource-Policy), nothing of ours uses a
device (Permissions-Policy), and API calls are never cached or shown as a page.
"""

from __future__ import annotations

import re

from django.http import HttpRequest
from ulid import ULID

REQUEST_ID_HEADER = "X-Request-Id"
# An id that a proxy or client may choose; anything else is replaced.
_USABLE_ID = re.compile(r"[A-Za-z0-9._:-]{8,64}", re.ASCII)

# Browser features that our pages don't use, and injected scripts must not either.
PERMISSIONS = ", ".join(
    [
        *(
            f"{feature}=()"
            for feature in (
                "accelerometer",
                "browsing-topics",
                "camera",
                "display-capture",
                "geolocation",
                "gyroscope",
                "hid",
                "magnetometer",
                "microphone",
                "midi",
                "payment",
                "publickey-credentials-get",
                "screen-wake-lock",
                "serial",
                "usb",
                "xr-spatial-tracking",
            )
        ),
        "clipboard-write=(self)",
    ]
)
# Of everything that is not a page, whichever part of the server answers.
API_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": PERMISSIONS,
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def choose_request_id(request: HttpRequest) -> str:
    """The request's id, which is kept in ``request.request_id``."""
    header = request.META.get("HTTP_X_REQUEST_ID", "")
    value = header if _USABLE_ID.fullmatch(header) else f"req_{ULID()}"
    request.request_id = value  # type: ignore[attr-defined]
    return value
