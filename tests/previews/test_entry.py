"""Who may come in, and what neither side is shown."""

from __future__ import annotations

import pytest
from django.test import override_settings

from orkestr_console.core.preview_base import PreviewBase, preview_base, preview_port
from orkestr_console.previews.entry import Secrets, Visit, admit
from orkestr_console.previews.headers import Origin, inwards, outwards
from tests.previews.conftest import HOST, SANDBOX, ULID, Echo, World, a_sandbox, request

SECRETS = Secrets("t" * 64, "c" * 64)
LOCAL = PreviewBase("http", "localhost:8001")
PUBLIC = PreviewBase("https", "previews.example.com")
COOKIE = (b"cookie", b"a=b; ork_preview=" + b"c" * 64)
OWN = f"http://{HOST}".encode()
SIBLING = f"http://3000-{ULID[:-1]}0.localhost:8001".encode()


def enters(*headers: tuple[bytes, bytes], method: bytes = b"GET", websocket: bool = False) -> bool:
    visit = Visit(method, b"/", list(headers), HOST, websocket)
    return admit(visit, SECRETS, LOCAL) is not None


def fetch(site: bytes, mode: bytes, dest: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"sec-fetch-site", site), (b"sec-fetch-mode", mode), (b"sec-fetch-dest", dest)]


def test_the_token_opens_and_nothing_like_it_does() -> None:
    assert enters((b"x-orkestr-preview-token", b"t" * 64))
    for wrong in (b"", b"t" * 63, b"c" * 64, b"T" * 64, b"\xff"):
        assert not enters((b"x-orkestr-preview-token", wrong))
        assert not enters((b"cookie", b"ork_preview=" + wrong.replace(b"c", b"x")))
    assert not enters()


def test_a_public_preview_asks_for_nothing_but_passes_no_token_on() -> None:
    entry = admit(Visit(b"GET", b"/?a=1&ork_preview_token=x", [], HOST), None, LOCAL)
    assert entry is not None and (entry.target, entry.redirect) == (b"/?a=1", False)


@pytest.mark.parametrize(
    ("target", "clean"),
    [
        (b"/?ork_preview_token=%b", b"/"),
        (b"/a?b=c&ork_preview_token=%b&d", b"/a?b=c&d"),
        (b"/?ork%5Fpreview_token=%b&ork_preview_token=2", b"/"),
    ],
)
def test_the_token_in_an_address_is_taken_out_of_it(target: bytes, clean: bytes) -> None:
    target = target.replace(b"%b", b"t" * 64)
    entry = admit(Visit(b"GET", target, [], HOST), SECRETS, LOCAL)
    assert entry is not None and (entry.target, entry.redirect) == (clean, True)
    # Nothing but a page is sent elsewhere.
    entry = admit(Visit(b"POST", target, [], HOST), SECRETS, LOCAL)
    assert entry is not None and (entry.target, entry.redirect) == (clean, False)
    entry = admit(Visit(b"GET", target, [], HOST, websocket=True), SECRETS, LOCAL)
    assert entry is not None and (entry.target, entry.redirect) == (clean, False)


def test_a_person_goes_there_and_the_page_itself_loads_more() -> None:
    for site in (b"none", b"same-site", b"cross-site"):
        assert enters(COOKIE, *fetch(site, b"navigate", b"document"))
    assert enters(COOKIE, *fetch(b"same-origin", b"cors", b"empty"), method=b"POST")
    assert enters(COOKIE, (b"origin", OWN), method=b"POST")
    # Neither a browser of these days nor sent by any page.
    assert enters(COOKIE)


@pytest.mark.parametrize("site", [b"same-site", b"cross-site", b"something-new"])
def test_no_other_page_uses_a_visitors_cookie(site: bytes) -> None:
    """A sibling's page is same-site, so that its requests bring the cookie."""
    assert not enters(COOKIE, *fetch(site, b"no-cors", b"script"))
    assert not enters(COOKIE, *fetch(site, b"no-cors", b"image"))
    assert not enters(COOKIE, *fetch(site, b"cors", b"empty"))
    assert not enters(COOKIE, *fetch(site, b"navigate", b"iframe"))
    assert not enters(COOKIE, *fetch(site, b"navigate", b"document"), method=b"POST")
    assert not enters(COOKIE, *fetch(site, b"websocket", b"websocket"), websocket=True)


@pytest.mark.parametrize("origin", [SIBLING, b"null", b"https://" + HOST.encode(), b"http://evil"])
def test_no_other_origin_uses_it_either(origin: bytes) -> None:
    assert not enters(COOKIE, (b"origin", origin), websocket=True)
    assert not enters(COOKIE, (b"origin", origin), method=b"POST")
    assert not enters(COOKIE, (b"origin", origin), *fetch(b"same-origin", b"cors", b"empty"))
    assert enters(COOKIE, (b"origin", OWN), websocket=True)
    assert not enters(COOKIE, (b"referer", SIBLING + b"/"))
    assert enters(COOKIE, (b"referer", OWN + b"/"))


def test_a_page_that_names_itself_nowhere_has_nothing_loaded_with_it() -> None:
    """Without TLS, a browser says neither whose page made it ask, nor what for."""
    agent = (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101 Firefox/140.0")
    goes = (b"upgrade-insecure-requests", b"1")
    assert not enters(COOKIE, agent, (b"accept", b"text/html"))
    assert not enters(COOKIE, agent, goes, (b"referer", SIBLING + b"/"))
    assert not enters(COOKIE, agent, goes, method=b"POST")
    assert enters(COOKIE, agent, goes)
    assert enters(COOKIE, agent, (b"referer", OWN + b"/"))
    assert enters(COOKIE, (b"user-agent", b"curl/8.14.1"))


@pytest.mark.parametrize(
    ("base", "kept"),
    [("lan.example:8001", b"origin, same-origin"), ("localhost:8001", b"origin,No-Referrer")],
)
def test_a_page_is_made_to_name_itself_to_its_own_host(base: str, kept: bytes) -> None:
    """Where browsers say nothing else of it."""
    sent = outwards([(b"referrer-policy", b"origin,No-Referrer")], PreviewBase("http", base))
    assert sent == [(b"referrer-policy", kept)]


def test_with_tls_the_cookie_is_bound_to_its_host() -> None:
    host = PUBLIC.host(SANDBOX, 80)
    for name, opens in ((b"__Host-ork_preview", True), (b"ork_preview", False)):
        visit = Visit(b"GET", b"/", [(b"cookie", name + b"=" + b"c" * 64)], host)
        assert (admit(visit, SECRETS, PUBLIC) is not None) == opens


async def test_a_browser_is_sent_on_with_a_cookie_of_this_host_alone(world: World) -> None:
    from sandboxes_app.services import preview_cookie, preview_token

    sandbox = world.sandbox = a_sandbox(preview_auth=True)
    world.program = echo = Echo()
    line = f"GET //evil.example/?ork_preview_token={preview_token(sandbox)} HTTP/1.1"
    answer = (await world.ask(request(line=line))).decode()
    assert " 303 " in answer.splitlines()[0]
    assert f"location: http://{HOST}//evil.example/\r\n" in answer
    cookie = preview_cookie(sandbox, 3000)
    given = f"set-cookie: ork_preview={cookie}; Path=/; HttpOnly; SameSite=Lax\r\n"
    assert given in answer and preview_token(sandbox) not in answer
    assert preview_cookie(sandbox, 3001) != cookie
    answer = (await world.ask(request(f"Cookie: x=y; ork_preview={cookie}; z"))).decode()
    assert " 200 " in answer.splitlines()[0]
    assert "\r\ncookie: x=y; z\r\n" in echo.heads[0] and cookie not in echo.heads[0]


SECRET_HEADERS = [
    (b"cookie", b"ork_preview=c; orkestr_session_8000=s; ORKESTR_CSRF_8000=d"),
    (b"x-orkestr-preview-token", b"t"),
    (b"authorization", b"Bearer ork_abc_def"),
    (b"referer", b"http://x/?ork%5Fpreview_token=t"),
    (b"x-forwarded-for", b"198.51.100.1"),
    (b"x-forwarded-port", b"1"),
    (b"x_forwarded_for", b"198.51.100.1"),
    (b"x-forwarded_proto", b"https"),
    (b"x.forwarded.host", b"evil"),
    (b"x_real_ip", b"198.51.100.1"),
    (b"x_orkestr_preview_token", b"t"),
    (b"forwarded", b"for=198.51.100.1"),
    (b"x-real-ip", b"198.51.100.1"),
    (b"proxy-authorization", b"Basic x"),
    (b"connection", b"keep-alive, x-hop, host, content-length"),
    (b"x-hop", b"1"),
    (b"te", b"trailers"),
    (b"upgrade", b"h2c"),
    (b"expect", b"100-continue"),
]


@override_settings(SESSION_COOKIE_NAME="orkestr_session_8000", CSRF_COOKIE_NAME="orkestr_csrf_8000")
def test_no_secret_and_no_claim_of_the_visitors_goes_inwards() -> None:
    kept = [(b"host", b"h"), (b"content-length", b"3"), (b"authorization", b"Basic eDp5")]
    origin = Origin("203.0.113.9", "https", "h")
    sent = inwards([*SECRET_HEADERS, *kept], origin, LOCAL, websocket=False)
    assert sent == [
        *kept,
        (b"x-forwarded-for", b"203.0.113.9"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"h"),
        (b"connection", b"close"),
    ]


def test_no_cookie_goes_out_that_others_would_be_sent() -> None:
    sent = outwards(
        [
            (b"set-cookie", b"a=1; Domain=localhost; Path=/; domain=.example.com;HttpOnly"),
            (b"set-cookie", b"ork_preview=stolen"),
            (b"set-cookie", b" ORK_PREVIEW =stolen; Path=/"),
            (b"connection", b"x-hop"),
            (b"x-hop", b"1"),
            (b"x-orkestr-preview", b"ok"),
            (b"clear-site-data", b'"cache", "Cookies"'),
            (b"clear-site-data", b'"*"'),
            (b"clear-site-data", b'"cache"'),
            (b"transfer-encoding", b"chunked"),
            (b"content-length", b"3"),
        ],
        LOCAL,
    )
    assert sent == [
        (b"set-cookie", b"a=1; Path=/;HttpOnly"),
        (b"clear-site-data", b'"cache"'),
    ]


# The base ----------------------------------------------------------------------------------------


def test_the_base_is_this_machines_own_unless_one_is_set() -> None:
    assert preview_port({}, 8000) == 8001
    assert preview_base({}, 8001) == LOCAL
    assert preview_port({"ORKESTR_PREVIEW_PORT": "off"}, 8000) is None
    assert preview_base({"ORKESTR_PREVIEW_BASE": "x.example"}, None) is None
    for text in ("previews.example.com", "https://Previews.example.com:443/"):
        assert preview_base({"ORKESTR_PREVIEW_BASE": text}, 8001) == PUBLIC
    base = preview_base({"ORKESTR_PREVIEW_BASE": "http://lan.example:8001"}, 8001)
    assert base == PreviewBase("http", "lan.example:8001")


@pytest.mark.parametrize("base", ["192.0.2.1", "[::1]", "a b", "x.example/y", "ftp://x.example"])
def test_a_base_that_has_no_subdomains_is_refused(base: str) -> None:
    with pytest.raises(ValueError, match="ORKESTR_PREVIEW_BASE is"):
        preview_base({"ORKESTR_PREVIEW_BASE": base}, 8001)


@pytest.mark.parametrize("port", ["0", "65536", "x", "-1", "8000"])
def test_a_port_that_is_none_or_taken_is_refused(port: str) -> None:
    with pytest.raises(ValueError, match="ORKESTR_PREVIEW_PORT"):
        preview_port({"ORKESTR_PREVIEW_PORT": port}, 8000)


def test_a_host_means_what_it_was_made_of() -> None:
    host = PUBLIC.host(SANDBOX, 3000)
    assert host == f"3000-{ULID}.previews.example.com"
    target = PUBLIC.read(host)
    assert target is not None and (target.sandbox_id, target.port) == (SANDBOX, 3000)
