"""Whether a visitor may come in.

A sandbox that was created without ``preview_auth`` is public: its name, which nobody can guess, is
all that one needs. Others ask for the token: in a header, or in the address, which a browser is at
once sent on from, with a cookie instead.

The cookie proves who visits, not what made their browser send the request. A page of another
sandbox is *same-site* and so could have it sent (RFC 6265bis, 5.2), which is why it counts only for
requests that our own page makes, or that a person makes by going to an address (Fetch Metadata).

Browsers say that only to a base with TLS, or on their own machine. Elsewhere a page can keep quiet
about itself in all that it loads, but not make that look like going somewhere.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.previews.headers import TOKEN_HEADER, cookie_name, first, without_token
from orkestr_console.previews.wire import Headers

SAFE = frozenset({b"GET", b"HEAD"})
# A person has typed it or chosen a bookmark, or the page is of this very host.
OWN_SITES = frozenset({b"same-origin", b"none"})
# What every browser calls itself; no page can change it (Fetch, 2.2.2) without asking first.
BROWSER = b"Mozilla/"


@dataclass(frozen=True)
class Secrets:
    """What opens one port of one sandbox."""

    token: str
    cookie: str


@dataclass(frozen=True)
class Visit:
    """A request, as far as it matters here. ``host`` is the name of the preview itself."""

    method: bytes
    target: bytes
    headers: Headers
    host: str
    websocket: bool = False


@dataclass(frozen=True)
class Entry:
    """A visitor who may come in: with this target, or after they were sent there.

    ``redirect`` gives a browser the cookie and an address without the token.
    """

    target: bytes
    redirect: bool = False


def admit(visit: Visit, secrets: Secrets | None, base: PreviewBase) -> Entry | None:
    """How a visitor comes in; None if they may not. ``secrets`` is None for a public preview."""
    target, shown = without_token(visit.target)
    if secrets is None:
        return Entry(target)
    header = first(visit.headers, TOKEN_HEADER)
    if header is not None and is_same(header, secrets.token):
        return Entry(target)
    if shown is not None and is_same(shown, secrets.token):
        return Entry(target, redirect=visit.method in SAFE and not visit.websocket)
    if has_cookie(visit, secrets, base) and cookie_counts(visit, base):
        return Entry(target)
    return None


def has_cookie(visit: Visit, secrets: Secrets, base: PreviewBase) -> bool:
    """Whether the request brings the cookie."""
    name = cookie_name(base).encode()
    pairs = [
        pair.strip().partition(b"=")
        for header, value in visit.headers
        if header == b"cookie"
        for pair in value.split(b";")
    ]
    return any(each == name and is_same(value, secrets.cookie) for each, _, value in pairs)


def cookie_counts(visit: Visit, base: PreviewBase) -> bool:
    """Whether it was not another page that made the browser send the request."""
    origin = first(visit.headers, b"origin")
    if origin is not None and origin != own_origin(visit.host, base):
        return False
    site = first(visit.headers, b"sec-fetch-site")
    if site is None:
        return origin is not None or is_unprompted(visit, base)
    return site in OWN_SITES or is_navigation(visit)


def is_navigation(visit: Visit) -> bool:
    """Whether a person goes there in a window of their own: a link, not a frame or a script."""
    return (
        visit.method in SAFE
        and not visit.websocket
        and first(visit.headers, b"sec-fetch-mode") == b"navigate"
        and first(visit.headers, b"sec-fetch-dest") == b"document"
    )


def is_unprompted(visit: Visit, base: PreviewBase) -> bool:
    """Whether a request without Fetch Metadata and origin is no other host's page's doing.

    The page may name none (Referrer Policy, 3). But what it then has a browser load is no
    navigation, which says so (Upgrade Insecure Requests, 3.2.1). Clients that are no browsers have
    no other pages.
    """
    referer = first(visit.headers, b"referer")
    if referer is not None:
        return refers_to_itself(referer, visit, base)
    is_browser = BROWSER in (first(visit.headers, b"user-agent") or b"")
    goes_there = first(visit.headers, b"upgrade-insecure-requests") is not None
    return not is_browser or (goes_there and visit.method in SAFE)


def refers_to_itself(referer: bytes, visit: Visit, base: PreviewBase) -> bool:
    """Whether the page that a request names is of the same host."""
    try:
        parts = urlsplit(referer.decode("latin-1"))
    except ValueError:
        return False
    return f"{parts.scheme}://{parts.netloc}".lower().encode() == own_origin(visit.host, base)


def own_origin(host: str, base: PreviewBase) -> bytes:
    """The origin of the preview's own pages (RFC 6454)."""
    return f"{base.scheme}://{host}".encode()


def is_same(shown: bytes, secret: str) -> bool:
    """Whether a secret was shown, found out in a time that tells nothing of it."""
    return hmac.compare_digest(shown, secret.encode())
