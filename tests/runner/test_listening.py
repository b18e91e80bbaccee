"""Where the console listens, and whose word it takes for who its clients are."""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.conf import settings
from django.test import Client

from orkestr_console.core.listening import TrustedProxies, listen_addresses, trusted_proxies
from orkestr_console.runner.layout import StartError, layout_from
from tests.processes import open_files
from tests.serving import Serving
from tests.serving import serving as serving

PROXIES = trusted_proxies("10.0.0.0/24, 2001:db8::/64")


def told(peer: str | None, proxies: Any, *headers: tuple[str, str]) -> tuple[str | None, set[str]]:
    """What an application is told of a connection: the client's address, and the headers' names."""
    seen: dict[str, Any] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)

    scope = {
        "type": "http",
        "client": [peer, 5] if peer else None,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
    }
    asyncio.run(TrustedProxies(application, proxies)(scope, None, None))
    client = seen["client"]
    return client[0] if client else None, {name.decode() for name, _ in seen["headers"]}


@pytest.mark.parametrize(
    ("chain", "address"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("203.0.113.5, 198.51.100.7", "198.51.100.7"),
        ("127.0.0.1, 198.51.100.7, 10.0.0.9", "198.51.100.7"),
        ("2001:db8:5::1", "2001:db8:5::1"),
        ("198.51.100.7, x", "10.0.0.1"),
        ("", "10.0.0.1"),
    ],
)
def test_behind_a_proxy_the_client_is_the_nearest_that_is_none(chain: str, address: str) -> None:
    forwarded = [("X-Forwarded-For", chain), ("X-Forwarded-Proto", "https")]
    assert told("10.0.0.1", PROXIES, *forwarded)[0] == address


def test_several_headers_are_one_list() -> None:
    headers = [("X-Forwarded-For", "203.0.113.5"), ("X-Forwarded-For", "198.51.100.7")]
    assert told("10.0.0.1", PROXIES, *headers)[0] == "198.51.100.7"


@pytest.mark.parametrize(
    ("peer", "proxies"), [("10.0.1.1", PROXIES), ("10.0.0.1", []), (None, PROXIES)]
)
def test_of_anybody_else_those_headers_are_taken_off(peer: str | None, proxies: Any) -> None:
    headers = [("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "https"), ("Accept", "*/*")]
    assert told(peer, proxies, *headers) == (peer, {"accept"})


def test_it_listens_on_this_machine_alone_unless_told_otherwise() -> None:
    assert listen_addresses(None)[0] == "127.0.0.1"
    assert set(listen_addresses(" ")) <= {"127.0.0.1", "::1"}
    assert listen_addresses("all")[0] in {"::", "0.0.0.0"}
    assert listen_addresses("192.0.2.1, 2001:db8::1") == ["192.0.2.1", "2001:db8::1"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("ORKESTR_LISTEN", "everywhere"), ("ORKESTR_TRUSTED_PROXIES", "proxy.example")],
)
def test_what_cannot_be_meant_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(StartError, match=f"{name} is '{value}': give addresses"):
        layout_from({name: value})


def test_the_start_looks_where_the_console_listens() -> None:
    named = layout_from({"ORKESTR_LISTEN": "2001:db8::1", "PORT": "8123"})
    assert named.local_url == "http://[2001:db8::1]:8123"
    assert layout_from({"ORKESTR_LISTEN": "all"}).local_url == "http://127.0.0.1:8000"


def sockets_of(process: int) -> set[str]:
    """The addresses, in the kernel's hexadecimal, that a process listens on (proc_net_tcp.rst)."""
    files = open_files(process)
    inodes = {found[1] for file in files if (found := re.fullmatch(r"socket:\[(\d+)\]", file))}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_a_web_process_by_default_is_reached_from_this_machine_alone(serving: Serving) -> None:
    loopback = {"0100007F", "0" * 24 + "01000000"}
    assert "0100007F" in sockets_of(serving.process.pid) <= loopback


@pytest.fixture
def behind_tls(django_db_setup: None) -> Iterator[Serving]:
    """A web process whose proxy is at 127.0.0.2."""
    proxy = {
        "ORKESTR_PUBLIC_URL": "https://console.example",
        "ORKESTR_TRUSTED_PROXIES": "127.0.0.2",
    }
    with tempfile.TemporaryDirectory(prefix="orkestr-serving-") as var:
        server = Serving(Path(var), settings.DATABASES["default"], **proxy)
        yield server
        server.close()


def test_only_the_proxy_says_that_a_request_came_by_tls(behind_tls: Serving) -> None:
    """Seen in HSTS, which browsers are told by TLS alone (RFC 6797, section 7.2)."""

    def hsts(source: str) -> bool:
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(transport=transport, base_url=behind_tls.url) as client:
            answer = client.get("/sign-in/", headers={"X-Forwarded-Proto": "https"})
        assert answer.status_code == 200
        return "strict-transport-security" in answer.headers

    assert hsts("127.0.0.2")
    assert not hsts("127.0.0.1")


def test_django_itself_takes_nobodys_word(db: None) -> None:
    """What stands before it is the only one that does."""
    answer = Client().get("/sign-in/", headers={"X-Forwarded-For": "198.51.100.7"})
    assert answer.wsgi_request.META["REMOTE_ADDR"] == "127.0.0.1"
