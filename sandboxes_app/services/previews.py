"""The token that a sandbox's previews ask for."""

from __future__ import annotations

import hashlib
import hmac

from django.conf import settings

from sandboxes_app.models import Sandbox


def preview_token(sandbox: Sandbox) -> str:
    """The token of one sandbox, derived from the installation's pepper, so that none is stored."""
    message = f"preview:{sandbox.pk}".encode()
    return hmac.new(settings.TOKEN_PEPPER.encode(), message, hashlib.sha256).hexdigest()
