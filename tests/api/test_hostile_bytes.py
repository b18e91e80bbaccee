"""What the real server makes of bytes that are no honest request, and what its log then says."""

from __future__ import annotations

import json
import re
import subprocess
from urllib.parse import quote

import pytest

from tests.serving import Serving
from tests.serving import serving as serving

HOST = b"Host: localhost\r\n"
LAST = HOST + b"Connection: close\r\n"
SECRET = "Sup3rSecretInvitation_abcdefghijklmnop"
TOKEN = f"ork_{'a' * 12}_{'S' * 44}"
ESCAPE = "\x1b[31m"


def status(answer: bytes) -> int:
    """The status of the first response; 0 for none."""
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(found[1]) if found else 0


def responses(answer: bytes) -> int:
    return len(re.findall(rb"HTTP/1\.1 \d{3} ", answer))


# Each would make a proxy in front and us disagree about where a request ends (RFC 9112, section
# 11.2): the tail would then be taken for a request of somebody else's.
SMUGGLED = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
SMUGGLING = {
    "length and chunks": b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
    "two lengths in one": b"Content-Length: 5, 5\r\n\r\nabcde",
    "a signed length": b"Content-Length: +5\r\n\r\nabcde",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a length in hexadecimal": b"Content-Length: 0x5\r\n\r\nabcde",
    "no length": b"Content-Length: \r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding after chunks": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "a coding with a tab": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    "a signed chunk size": b"Transfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
    "a chunk longer than it says": b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("fields", SMUGGLING.values(), ids=SMUGGLING)
def test_a_request_that_ends_in_two_places_is_refused(serving: Serving, fields: bytes) -> None:
    head = b"POST /v1/templates HTTP/1.1\r\n" + HOST
    # It closes the connection by itself: the tail is nobody's request.
    answer = serving.raw(head + fields + SMUGGLED)
    assert status(answer) in {0, 400, 501}, answer
    assert responses(answer) <= 1
    assert b'"ok"' not in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /v1/templates HTTP/1.1\r\n" + HOST + SMUGGLING["two lengths"],
        b"POST /v1/templates HTTP/1.1\r\n" + HOST + SMUGGLING["a chunk size that is none"],
        b"POST /v1/templates HTTP/1.1\r\n" + HOST + b"Nothing\r\n\r\n",
        b"POST /v1/templates HTTP/1.1\r\n" + LAST + b"Content-Type: multipart/form-data\r\n"
        b"Content-Length: 3\r\n\r\n--x",
    ],
)
def test_what_no_view_sees_is_refused_as_everything_is(
    serving: Serving, request_bytes: bytes
) -> None:
    answer = serving.raw(request_bytes)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) in {400, 401}, answer
    assert b"content-type: application/json" in head.lower()
    assert b"x-request-id: req_" in head.lower()
    said = json.loads(body)
    assert said["detail"] and said["code"] in {"invalid_request", "unauthenticated"}


def test_honest_requests_one_after_the_other_are_both_answered(serving: Serving) -> None:
    """So that the test above means something: a tail is a request when the first one ends."""
    whole = b"POST /v1/templates HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\nabcde"
    answer = serving.raw(whole + SMUGGLED, b'"ok"')
    assert responses(answer) == 2
    assert status(answer) == 401 and b'"ok"' in answer
    chunked = b"POST /v1/templates HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    assert responses(serving.raw(chunked + b"1\r\na\r\n0\r\n\r\n" + SMUGGLED, b'"ok"')) == 2


@pytest.mark.parametrize(
    ("request_line", "fields", "expected"),
    [
        (b"GET /healthz HTTP/1.1", b"X: " + b"a" * 20_000 + b"\r\n", {0, 400, 431}),
        (b"GET /healthz HTTP/1.1", b"".join(b"X%d: y\r\n" % n for n in range(600)), {0, 400, 431}),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1", b"", {0, 400, 414}),
        (b"GET /healthz HTTP/1.1", b"Nothing\r\n", {0, 400}),
        (b"GET /healthz HTTP/1.1", b"X: a\x00b\r\n", {400}),
        (b"GET /healthz HTTP/1.1", b"X: a\x0bb\r\n", {400}),
        (b"GET /\xff\xfe HTTP/1.1", b"", {400}),
        (b"GET /?\xff HTTP/1.1", b"", {400}),
        (b"GARBAGE", b"", {0, 400}),
        (b"GET /a\x1b[31mb HTTP/1.1", b"", {400, 404, 302}),
        (b"GET http://evil.example/healthz HTTP/1.1", b"", {400, 404, 302}),
    ],
)
def test_what_is_no_request_gets_no_page(
    serving: Serving, request_line: bytes, fields: bytes, expected: set[int]
) -> None:
    answer = serving.raw(request_line + b"\r\n" + LAST + fields + b"\r\n")
    assert status(answer) in expected, answer[:300]
    assert b"Traceback" not in answer
    assert b'"ok"' not in answer


def test_errors_before_the_application_say_as_much_to_browsers(serving: Serving) -> None:
    for answer in (
        serving.raw(b"GET / HTTP/1.1\r\nX: a\x0bb\r\n" + LAST + b"\r\n"),
        serving.raw(b"POST /v1/x HTTP/1.1\r\n" + HOST + b"Content-Length: 99999999999\r\n\r\n"),
    ):
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["code"] in {"invalid_request", "payload_too_large"}
        text = head.decode().lower()
        assert "content-security-policy: default-src 'none'; base-uri 'none'" in text
        assert "x-content-type-options: nosniff" in text
        assert "cache-control: no-store" in text
        assert "content-type: application/json" in text


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"http://localhost/healthz?x=1", 200),
        (b"HTTPS://localhost:8443/healthz", 200),
        (b"http://localhost?x=1", 302),
        (b"http://localhost/v1/sandboxes", 401),
        # The target's host counts, not the header's.
        (b"http://elsewhere.example/healthz", 400),
        (b"http:///healthz", 404),
    ],
)
def test_a_target_written_for_a_proxy_is_what_it_stands_for(
    serving: Serving, target: bytes, expected: int
) -> None:
    assert status(serving.raw(b"GET " + target + b" HTTP/1.1\r\n" + LAST + b"\r\n")) == expected


def test_where_the_application_begins_is_not_for_a_client_to_say(serving: Serving) -> None:
    """Daphne believes the header; redirects and links would lead to another host."""
    root = b"Daphne-Root-Path: //evil.example\r\n"
    answer = serving.raw(b"GET /templates/ HTTP/1.1\r\n" + LAST + root + b"\r\n")
    assert status(answer) == 302
    assert b"location: /sign-in/?next=/templates/" in answer.lower()
    assert b"evil" not in answer


@pytest.mark.parametrize(
    "path", ["/ws/nothing/", "/ws/%0d%0aX:%20y/", "/", "/ws/templates/../../x"]
)
def test_a_socket_to_nowhere_is_refused_and_no_error(serving: Serving, path: str) -> None:
    before = serving.log()
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    key = "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    answer = serving.raw(f"{head}{key}Sec-WebSocket-Version: 13\r\n\r\n".encode(), b"\r\n\r\n")
    assert status(answer) == 403, answer
    assert serving.log() == before


# The log ------------------------------------------------------------------------------------------

RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.-]+: ")


@pytest.mark.django_db(transaction=True)
def test_nothing_a_stranger_sends_makes_a_line_or_a_colour_in_the_log(serving: Serving) -> None:
    forged = f"x\n2026-01-01 00:00:00,000 ERROR root: {ESCAPE}all is lost\r\x9b\u202e"
    client = serving.client()
    client.get("/sign-in/")
    cookie = next(value for name, value in client.cookies.items() if "csrf" in name)
    form = {"email": forged, "password": "hunter2hunter2", "csrfmiddlewaretoken": cookie}
    assert client.post("/sign-in/", data=form, headers={"Referer": serving.url}).status_code == 400
    # And a refusal that Django itself logs, of a path that is as bad.
    path = f"/team/tokens/{quote(forged, safe='')}/revoke/"
    client.post(path, headers={"User-Agent": "x\t" + forged[2:20], "X-Request-Id": "a b"})
    log = serving.log()
    assert "all is lost" in log and "Forbidden (CSRF" in log, "the log has none of it: no proof"
    lines = log.splitlines()
    assert [line for line in lines if not RECORD.match(line)] == []
    assert [line for line in lines if line.startswith("2026-01-01")] == []
    assert not set(log) & {"\x1b", "\r", "\x9b", "\u202e", "\u2028"}


def test_no_secret_is_in_the_log(serving: Serving) -> None:
    client = serving.client()
    client.get(f"/join/{SECRET}/")
    client.post(f"/join/{SECRET}/", headers={"Referer": f"{serving.url}/join/{SECRET}/"})
    client.get("/v1/templates", headers={"Authorization": f"Bearer {TOKEN}"})
    client.get(f"/v1/templates?token={TOKEN}")
    client.get("/", headers={"Host": f"{SECRET}.example"})
    log = serving.log()
    assert "/join/***" in log, "the address was not logged at all: no proof"
    assert SECRET not in log
    assert "hunter2hunter2" not in log
    assert "S" * 44 not in log


def test_no_secret_is_in_the_process_list(serving: Serving) -> None:
    """Its key and pepper come by the environment, which other users cannot read (proc(5))."""
    listed = subprocess.run(
        ["ps", "-o", "args=", "-p", str(serving.process.pid)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "manage.py serve" in listed
    for name in ("ORKESTR_SECRET_KEY", "ORKESTR_TOKEN_PEPPER"):
        assert serving.environment[name] not in listed
