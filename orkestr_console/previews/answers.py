"""What the front says itself, to people as a page and to programs as JSON like the API's errors.

Each has the header ``X-Orkestr-Preview`` with its code, so that nobody takes it for the program's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from http import HTTPStatus

from orkestr_console.previews.headers import first
from orkestr_console.previews.wire import Headers

# Nothing of it is kept, shown in a frame, or reads anything.
SHELL: Headers = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
PAGE = """\
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>{title}</title></head>
<body><h1>{title}</h1><p>{detail}</p></body>
</html>
"""


@dataclass(frozen=True)
class Answer:
    """An answer of the front's. ``title`` is what happened, ``detail`` what to do."""

    status: HTTPStatus
    code: str
    title: str
    detail: str
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self, headers: Headers) -> tuple[bytes, bytes]:
        """The media type and the body, by what a request's headers accept."""
        if b"text/html" in (first(headers, b"accept") or b"").lower():
            page = PAGE.format(title=escape(self.title), detail=escape(self.detail))
            return b"text/html; charset=utf-8", page.encode()
        wire = {"detail": f"{self.title}. {self.detail}", "code": self.code}
        return b"application/json", json.dumps(wire).encode()


RETRY = ((b"retry-after", b"1"),)

HEALTHY = Answer(HTTPStatus.OK, "ok", "Previews are served", "The front answers.")
UNKNOWN = Answer(
    HTTPStatus.NOT_FOUND,
    "no_such_preview",
    "There is no such preview",
    "No sandbox has this address: it may have ended, have no network, or never have been. "
    "Ask for the address again with get_host.",
)
TOKEN_NEEDED = Answer(
    HTTPStatus.UNAUTHORIZED,
    "preview_token_needed",
    "This preview needs its token",
    "Open it with the address that the sandbox's owner has, which ends in "
    "?ork_preview_token=…, or send the token in the header X-Orkestr-Preview-Token.",
    # RFC 9110, 11.6.1, wants a challenge; browsers ask for no password for one they don't know.
    ((b"www-authenticate", b"Orkestr-Preview"),),
)
PAUSED = Answer(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "sandbox_paused",
    "The sandbox is paused",
    "Resume it in the console or with the API, then reload. One that is created with auto_resume "
    "wakes by itself.",
    ((b"retry-after", b"10"),),
)
STARTING = Answer(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "sandbox_not_running",
    "The sandbox is just starting",
    "Reload in a moment.",
    RETRY,
)
TOO_MANY = Answer(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "too_many_connections",
    "This preview has as many visitors as it may",
    "Wait until some of its connections have ended, then reload.",
    ((b"retry-after", b"5"),),
)
AWAY = Answer(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "host_unavailable",
    "The preview can't be reached now",
    "A part of the server is just restarting; reload in a moment.",
    ((b"retry-after", b"5"),),
)
SILENT = Answer(
    HTTPStatus.GATEWAY_TIMEOUT,
    "preview_timeout",
    "The program in the sandbox does not answer",
    "It has accepted the request and sent nothing for minutes. See what it is doing.",
)
UNINTELLIGIBLE = Answer(
    HTTPStatus.BAD_GATEWAY,
    "bad_response",
    "The program in the sandbox sent no valid HTTP response",
    "Check that what listens on this port speaks HTTP/1.1, and not TLS.",
)
MALFORMED = Answer(
    HTTPStatus.BAD_REQUEST,
    "malformed_request",
    "This is no valid HTTP request",
    "Its head is not HTTP/1.1, or leaves open where its body ends.",
)
HEAD_TOO_LARGE = Answer(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    "head_too_large",
    "The request's head is too large",
    "All headers together may take 32 KiB; delete cookies of this preview.",
)
BROKEN = Answer(
    HTTPStatus.INTERNAL_SERVER_ERROR,
    "internal_error",
    "The preview failed because of a mistake in the server",
    "Its log says more. The sandbox is not affected.",
)


def nothing_listens(port: int) -> Answer:
    """No program accepts connections to the port."""
    return Answer(
        HTTPStatus.BAD_GATEWAY,
        "nothing_listens",
        f"Nothing listens on port {port}",
        f"Start a server in the sandbox that listens on port {port}, on any address, then reload. "
        "One that was just started may need a moment.",
        RETRY,
    )


def cannot_wake(detail: str) -> Answer:
    """A paused sandbox could not be resumed."""
    status = HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(status, "cannot_resume", "The sandbox is paused and can't wake", detail, RETRY)


def redirect(address: bytes, cookie: bytes) -> Answer:
    """To the address without the token, with the cookie."""
    return Answer(
        HTTPStatus.SEE_OTHER,
        "signed_in",
        "You may see this preview",
        "Your browser is sent on to it.",
        ((b"location", address), (b"set-cookie", cookie)),
    )
