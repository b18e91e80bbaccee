"""A webhook's secret, and the signature of what is sent to it.

The secret is derived from the webhook's id with the installation's pepper, as API tokens are
verified with it: a stolen database holds no secret, and nothing needs to be stored.
"""

from __future__ import annotations

import hashlib
import hmac

from django.conf import settings

# Separates these secrets from everything else that is made with the pepper.
PURPOSE = "webhook secret of "


def secret_of(webhook_id: str) -> str:
    """``whsec_`` and 256 bits in hexadecimal."""
    key, message = settings.TOKEN_PEPPER.encode(), f"{PURPOSE}{webhook_id}".encode()
    return f"whsec_{hmac.new(key, message, hashlib.sha256).hexdigest()}"


def signature(secret: str, body: bytes) -> str:
    """The value of ``X-Orkestr-Signature``: ``sha256=`` and the HMAC-SHA256 of the exact body."""
    return f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
