"""What is passed on of a visitor's request, and of a program's response.

Inwards nothing goes that is a secret of ours or the visitor's claim about where they are: no token,
no cookie of the front or the console, no forwarding header but our own, however a name is spelled:
programs take ``_`` for ``-`` (RFC 3875, 4.1.18). Outwards no cookie goes that another sandbox or
the console would be sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from django.conf import settings

from orkestr_console.core.preview_base import PreviewBase
from orkestr_console.previews.wire import Headers

# Says that an answer is the front's own.
CODE_HEADER = b"x-orkestr-preview"
TOKEN_HEADER = b"x-orkestr-preview-token"
TOKEN_PARAMETER = b"ork_preview_token"
# What API tokens begin with (orkestr_console.accounts.tokens).
API_TOKEN = b"ork_"
# Of one connection (RFC 9110, 7.6.1), or for it alone.
HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization"),
        *(b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    }
)
# Where a request has been is ours to say.
FORWARDING = frozenset(
    {
        *(b"forwarded", b"via", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip"),
        *(b"true-client-ip", b"cf-connecting-ip", b"x-original-host", b"x-original-url"),
        b"x-rewrite-url",
    }
)
FORWARDING_PREFIX = b"x-forwarded-"
INWARD_DROPPED = HOP_BY_HOP | FORWARDING | {TOKEN_HEADER}
WEBSOCKET = b"websocket"
# What CGI's successors make one character of.
_OTHER = re.compile(rb"[^a-z0-9]")
_NO_REFERRER = b"no-referrer"


@dataclass(frozen=True)
class Origin:
    """Where a request comes from, for the program that it goes to."""

    client: str
    scheme: str
    host: str


def cookie_name(base: PreviewBase) -> str:
    """The front's cookie. With TLS, browsers hold it to its own host (RFC 6265bis, 4.1.3.2)."""
    return "__Host-ork_preview" if base.is_secure else "ork_preview"


def own_cookies(base: PreviewBase) -> frozenset[str]:
    """The names that no program is shown, in lower case, and that none may set."""
    console = (settings.SESSION_COOKIE_NAME, settings.CSRF_COOKIE_NAME)
    return frozenset(name.lower() for name in (cookie_name(base), *console))


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first header of a name, in lower case as h11 has them."""
    return next((value for each, value in headers if each == name), None)


def wants_websocket(method: bytes, headers: Headers) -> bool:
    """Whether a request asks for a WebSocket (RFC 6455, 4.1)."""
    options = connection_options(headers)
    upgrade = [value.strip().lower() for name, value in headers if name == b"upgrade"]
    return method == b"GET" and b"upgrade" in options and upgrade == [WEBSOCKET]


def connection_options(headers: Headers) -> set[bytes]:
    """What the ``Connection`` headers name (RFC 9110, 7.6.1)."""
    values = b",".join(value for name, value in headers if name == b"connection")
    return {option.strip().lower() for option in values.split(b",") if option.strip()}


def inwards(headers: Headers, origin: Origin, base: PreviewBase, *, websocket: bool) -> Headers:
    """A request's headers for a program. How long its body is stays as the visitor said."""
    dropped = connection_options(headers) - {b"host", b"content-length"}
    kept: Headers = []
    for name, value in headers:
        if name in dropped or is_ours_to_say(name):
            continue
        if name == b"cookie":
            value = other_cookies(value, own_cookies(base))
        if value and not carries_secret(name, value):
            kept.append((name, value))
    if any(name == b"transfer-encoding" for name, _ in headers):
        kept.append((b"transfer-encoding", b"chunked"))
    kept += [
        (b"x-forwarded-for", origin.client.encode()),
        (b"x-forwarded-proto", origin.scheme.encode()),
        (b"x-forwarded-host", origin.host.encode()),
    ]
    if websocket:
        return [*kept, (b"connection", b"upgrade"), (b"upgrade", WEBSOCKET)]
    return [*kept, (b"connection", b"close")]


def is_ours_to_say(name: bytes) -> bool:
    """Whether a program could take a header for one that the front sends, or keeps."""
    read = _OTHER.sub(b"-", name)
    return read in INWARD_DROPPED or read.startswith(FORWARDING_PREFIX)


def other_cookies(value: bytes, own: frozenset[str]) -> bytes:
    """A ``Cookie`` header without some cookies."""
    pairs = [pair.strip() for pair in value.split(b";")]
    others = [pair for pair in pairs if pair and _cookie_name(pair) not in own]
    return b"; ".join(others)


def _cookie_name(pair: bytes) -> str:
    return pair.partition(b"=")[0].strip().decode("latin-1").lower()


def carries_secret(name: bytes, value: bytes) -> bool:
    """Whether a header would show a program one of our tokens."""
    if name == b"authorization":
        return value.partition(b" ")[2].strip().startswith(API_TOKEN)
    return name == b"referer" and TOKEN_PARAMETER in unquote_bytes(value)


def unquote_bytes(value: bytes) -> bytes:
    """Percent-decoded."""
    return unquote(value.decode("latin-1"), "latin-1").encode("latin-1")


def outwards(headers: Headers, base: PreviewBase) -> Headers:
    """A response's headers for the visitor."""
    dropped = HOP_BY_HOP | connection_options(headers) | {CODE_HEADER}
    if any(name == b"transfer-encoding" for name, _ in headers):
        # It says nothing then (RFC 9112, 6.3), and the body is framed anew.
        dropped |= {b"content-length"}
    kept: Headers = []
    for name, value in headers:
        if name == b"set-cookie":
            cookie = host_only(value, own_cookies(base))
            if cookie is not None:
                kept.append((name, cookie))
        elif name == b"referrer-policy" and not base.is_told_of_pages:
            kept.append((name, naming_itself(value)))
        elif name not in dropped and not clears_cookies(name, value):
            kept.append((name, value))
    return kept


def naming_itself(policy: bytes) -> bytes:
    """A ``Referrer-Policy`` by which a page names itself to its own host, and to no other.

    Where that is all that tells its requests from another page's.
    """
    names = (each.strip() for each in policy.split(b","))
    return b", ".join(b"same-origin" if each.lower() == _NO_REFERRER else each for each in names)


def clears_cookies(name: bytes, value: bytes) -> bool:
    """Whether a header would end sessions of other hosts as well.

    Cookies are cleared for the whole site: those of other sandboxes' previews, and of the console
    if it is below the same domain (Clear Site Data, 3.1).
    """
    return name == b"clear-site-data" and any(
        kind in value.lower() for kind in (b"cookies", b"*", b"clienthints")
    )


def host_only(value: bytes, own: frozenset[str]) -> bytes | None:
    """A ``Set-Cookie`` for its own host alone; None if its name is one of ours.

    With a ``Domain`` it would be sent to the previews of other sandboxes as well (RFC 6265, 5.1.3).
    """
    pair, *attributes = value.split(b";")
    if _cookie_name(pair.strip()) in own:
        return None
    kept = [each for each in attributes if each.partition(b"=")[0].strip().lower() != b"domain"]
    return b";".join([pair, *kept])


def websocket_answer(headers: Headers, base: PreviewBase) -> Headers:
    """The headers of a response that accepts a WebSocket."""
    return [*outwards(headers, base), (b"connection", b"upgrade"), (b"upgrade", WEBSOCKET)]


def without_token(target: bytes) -> tuple[bytes, bytes | None]:
    """A request's target without the token's parameter, and the token if there was one."""
    path, mark, query = target.partition(b"?")
    if not mark:
        return target, None
    token: bytes | None = None
    kept = []
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if unquote_bytes(name) == TOKEN_PARAMETER:
            token = token or unquote_bytes(value)
        else:
            kept.append(part)
    if token is None:
        return target, None
    rest = b"&".join(kept)
    return (path + b"?" + rest if rest else path), token
