"""API tokens: how they look, how they are made, and how one is recognised.

``ork_<lookup>_<secret>``: ``lookup`` finds the row, and the whole token's HMAC-SHA256 under the
installation's pepper is compared with the row's in constant time. Only the digest is stored.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string

from django.conf import settings

ALPHABET = string.ascii_letters + string.digits
LOOKUP_LENGTH = 12
SECRET_LENGTH = 44
_TOKEN = re.compile(
    rf"ork_(?P<lookup>[A-Za-z0-9]{{{LOOKUP_LENGTH}}})_[A-Za-z0-9]{{{SECRET_LENGTH}}}", re.ASCII
)


def new_token() -> tuple[str, str]:
    """A fresh token and its lookup part; 62^44 secrets, so about 262 bits of randomness."""
    lookup, secret = (
        "".join(secrets.choice(ALPHABET) for _ in range(length))
        for length in (LOOKUP_LENGTH, SECRET_LENGTH)
    )
    return f"ork_{lookup}_{secret}", lookup


def lookup_of(token: str) -> str | None:
    """The part of a well-formed token that finds its row; None for anything else."""
    match = _TOKEN.fullmatch(token)
    return match["lookup"] if match else None


def digest(token: str) -> str:
    """What is stored of a token: HMAC-SHA256 under the pepper, in hexadecimal."""
    return hmac.new(settings.TOKEN_PEPPER.encode(), token.encode(), hashlib.sha256).hexdigest()


def matches(token: str, stored: str) -> bool:
    """Whether ``stored`` is the digest of ``token``, in time that does not tell how nearly."""
    return hmac.compare_digest(digest(token), stored)
