"""The page that connects an agent: the snippets of each client, and a token made for it."""

from __future__ import annotations

import ast
import html
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from django.contrib.sessions.models import Session
from django.test import Client, override_settings
from mcp.server import MCPServer
from starlette.types import ASGIApp, Receive, Scope, Send

from orkestr_console.accounts import tokens
from orkestr_console.accounts.models import ApiToken, AuditEntry, Role, Team, User
from orkestr_console.console import connect
from orkestr_console.core.addresses import MCP_PATH
from tests.conftest import api_client, make_user
from tests.console.markup import tight

ADDRESS = "/connect/"
GOOD = {"name": "agent", "access": "write", "client": "cursor"}
URL = "https://console.example/api/sandboxes/mcp"
TOKEN = "ork_ABCDEFGHJKMN_secretsecret"
# What an operator may set as the public address, or a request may call us by.
ODD = [
    "http://127.0.0.1:8123",
    "http://[::1]:8123",
    'https://console.example/it\'s "quoted"',
    "https://console.example/$(id)`id`;id",
    "https://console.example/<b>&amp;</b>",
    "https://console.example/\\back\x7f/ü/𝄞",
]


def text(answer: Any) -> str:
    return tight(answer)


def snippets(answer: Any) -> dict[str, str]:
    """What a person copies: the text of each snippet by its client and its place."""
    found = re.findall(
        r'<section class="snippet" aria-label="([^"]*)">.*?<pre[^>]*><code>(.*?)</code></pre>',
        text(answer),
        re.DOTALL,
    )
    return {
        html.unescape(label): html.unescape(re.sub(r"</?mark>", "", body)) for label, body in found
    }


def shown_token(answer: Any) -> str:
    found = re.search(r'<code id="new-token">(ork_\w+)</code>', text(answer))
    assert found
    return found[1]


def blocks(url: str, token: str = TOKEN) -> dict[str, list[str]]:
    return {guide.key: [b.text for b in guide.blocks] for guide in connect.guides(url, token)}


@pytest.fixture
def member(bob: User) -> Client:
    client = Client()
    client.force_login(bob)
    return client


# The page -----------------------------------------------------------------------------------------


def test_each_client_has_its_snippet_with_the_address_and_a_place_for_the_token(
    console: Client,
) -> None:
    answer = console.get(ADDRESS)
    shown = snippets(answer)
    assert {label.partition(": ")[0] for label in shown} == {
        *(
            "Claude Code",
            "Claude Desktop",
            "Cursor",
            "VS Code",
            "Codex",
            "Python",
            "curl",
            "Other clients",
        )
    }
    of_page = connect.guides("http://testserver/api/sandboxes/mcp", "ork_YOUR_TOKEN")
    assert list(shown.values()) == [block.text for guide in of_page for block in guide.blocks]
    assert "Replace <code>ork_YOUR_TOKEN</code>" in text(answer)


def test_what_is_copied_is_what_is_shown(console: Client) -> None:
    answer = console.post(ADDRESS, GOOD)
    copied = [html.unescape(one) for one in re.findall(r'data-copy="([^"]*)"', text(answer))]
    assert copied == [shown_token(answer), *snippets(answer).values()]


@pytest.mark.parametrize("role", [Role.MEMBER, Role.ADMIN, Role.OWNER])
def test_everybody_sees_it_and_finds_it_in_the_menu(team: Team, role: Role) -> None:
    client = Client()
    client.force_login(make_user("somebody", team, role))
    page = text(client.get(ADDRESS))
    assert f'href="{ADDRESS}" aria-current="page"' in page
    assert ("Create a token for this agent" in page) == (role != Role.MEMBER)


def test_a_member_is_told_whom_to_ask_and_makes_no_token(member: Client, alice: User) -> None:
    answer = member.get(ADDRESS)
    assert "Ask Alice (alice@example.org)" in text(answer)
    assert 'method="post" action="/connect/"' not in text(answer)
    refused = member.post(ADDRESS, GOOD)
    assert refused.status_code == 403
    assert "ork_YOUR_TOKEN" in text(refused)
    assert not ApiToken.objects.exists()


def test_the_page_of_a_new_token_leads_here(console: Client) -> None:
    page = text(console.post("/team/tokens/", {"name": "ci", "scopes": ["sandboxes:read"]}))
    banner = page.partition('id="new-token"')[2].partition("</section>")[0]
    assert f'href="{ADDRESS}"' in banner


# A token ------------------------------------------------------------------------------------------


def test_a_new_token_is_in_the_snippets_of_every_client_once(console: Client) -> None:
    answer = console.post(ADDRESS, GOOD)
    token = shown_token(answer)
    shown = snippets(answer)
    with_it = {label.partition(": ")[0] for label, body in shown.items() if token in body}
    assert with_it == {label.partition(": ")[0] for label in shown}
    assert "YOUR_TOKEN" not in text(answer)
    assert "no-store" in answer["Cache-Control"]
    again = console.get(ADDRESS)
    assert token not in text(again)
    assert "ork_YOUR_TOKEN" in text(again)


def test_a_new_token_works_and_is_kept_nowhere(
    console: Client, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        token = shown_token(console.post(ADDRESS, {**GOOD, "name": "builder"}))
    assert api_client(token).get("/v1/templates").status_code == 200
    row = ApiToken.objects.get()
    assert (row.name, row.team, sorted(row.scopes)) == (
        "builder",
        team,
        ["sandboxes:read", "sandboxes:write"],
    )
    assert row.expires_at is not None
    assert (row.expires_at - row.created_at).days in (89, 90)
    secret = token.rpartition("_")[2]
    assert secret not in caplog.text
    assert secret not in str([session.get_decoded() for session in Session.objects.all()])
    assert secret not in str(AuditEntry.objects.get(action="token.create").data)


def test_a_reading_token_only_reads(console: Client) -> None:
    answer = console.post(ADDRESS, {**GOOD, "access": "read"})
    assert "and can only read" in text(answer)
    client = api_client(shown_token(answer))
    assert ApiToken.objects.get().scopes == ["sandboxes:read"]
    assert client.get("/v1/sandboxes").status_code == 200
    refused = client.post(
        "/v1/sandboxes", {"template": "debian-12"}, content_type="application/json"
    )
    assert (refused.status_code, refused.json()["code"]) == (403, "insufficient_scope")


@pytest.mark.parametrize("client", ["cursor", "codex", "other"])
def test_the_client_it_was_asked_for_stays_in_front(console: Client, client: str) -> None:
    page = text(console.post(ADDRESS, {**GOOD, "client": client}))
    assert re.findall(r'name="client" [^>]*value="([\w-]+)"[^>]* checked>', page) == [client]


@pytest.mark.parametrize("client", ["", "nonsense", '"><script>'])
def test_a_client_that_is_none_counts_for_nothing(console: Client, client: str) -> None:
    answer = console.post(ADDRESS, {**GOOD, "client": client})
    assert answer.status_code == 200
    found = re.findall(r'name="client" [^>]*value="([\w-]+)"[^>]* checked>', text(answer))
    assert found == ["claude-code"]
    assert '"><script>' not in text(answer)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": " "}, "The name must have at least 1 characters"),
        ({"name": "x" * 101}, "at most 100 characters"),
        ({"name": "a\x00b"}, "The name"),
        ({"access": ""}, "Permissions must be chosen"),
        ({"access": "*"}, "Permissions must be chosen"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_typed_is_lost(
    console: Client, change: dict[str, str], sentence: str
) -> None:
    answer = console.post(ADDRESS, {**GOOD, "name": "mine", **change})
    assert answer.status_code == 400
    assert sentence in text(answer)
    assert not ApiToken.objects.exists()
    typed = {"name": "mine", **change}["name"]
    assert f'name="name" value="{typed}"' in text(answer)


def test_a_form_of_another_site_makes_no_token(alice: User) -> None:
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(alice)
    assert strict.post(ADDRESS, GOOD).status_code == 403
    assert not ApiToken.objects.exists()


# The texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ODD)
def test_any_address_comes_out_of_the_page_as_it_was_set(console: Client, address: str) -> None:
    with override_settings(PUBLIC_URL_IS_SET=True, PUBLIC_URL=address):
        answer = console.get(ADDRESS)
    expected = blocks(f"{address}/api/sandboxes/mcp", "ork_YOUR_TOKEN")
    assert list(snippets(answer).values()) == [one for texts in expected.values() for one in texts]
    assert "<b>&amp;</b>" not in text(answer)


@pytest.mark.parametrize("address", ODD)
def test_json_toml_and_python_have_the_address_and_the_token(address: str) -> None:
    url = f"{address}/api/sandboxes/mcp"
    made = blocks(url)
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    http = {"type": "http", "url": url, "headers": bearer}
    assert json.loads(made["cursor"][0]) == {
        "mcpServers": {"orkestr": {"url": url, "headers": bearer}}
    }
    assert json.loads(made["other"][0]) == {"mcpServers": {"orkestr": http}}
    desktop = json.loads(made["claude-desktop"][0])["mcpServers"]["orkestr"]
    assert desktop["args"][1:5] == ["mcp-remote", url, "--header", "Authorization:${AUTH}"]
    assert desktop["env"] == {"AUTH": f"Bearer {TOKEN}"}
    code = json.loads(made["vs-code"][0])
    assert code["servers"]["orkestr"]["url"] == url
    asked = code["inputs"][0]["id"]
    assert code["servers"]["orkestr"]["headers"] == {"Authorization": f"Bearer ${{input:{asked}}}"}
    codex = tomllib.loads(made["codex"][0])["mcp_servers"]["orkestr"]
    lines = [line for line in made["python"][0].splitlines() if line.startswith("URL = ")]
    assert [ast.literal_eval(line.partition(" = ")[2]) for line in lines] == [url]
    assert codex == {"url": url, "bearer_token_env_var": "ORKESTR_API_KEY"}
    assert shlex.split(made["codex"][1]) == ["export", f"ORKESTR_API_KEY={TOKEN}"]


@pytest.mark.parametrize("address", ODD)
def test_a_shell_reads_the_address_as_one_word(address: str) -> None:
    url = f"{address}/api/sandboxes/mcp"
    made = blocks(url)
    words = heard_by_a_program(made["claude-code"][0], "claude")
    assert words == [
        *("mcp", "add", "--transport", "http", "orkestr", url),
        *("--header", f"Authorization: Bearer {TOKEN}"),
    ]
    words = heard_by_a_program(made["curl"][0], "curl")
    assert words[:4] == ["-sS", "-X", "POST", url]
    assert f"Authorization: Bearer {TOKEN}" in words
    assert json.loads(words[-1])["method"] == "initialize"


def heard_by_a_program(line: str, program: str) -> list[str]:
    """The arguments that bash gives it, read by a function of its name."""
    script = f"{program}() {{ printf '%s\\0' \"$@\"; }}\n{line}\n"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        ("http://127.0.0.1:8123", False),
        ("http://localhost:8123", False),
        ("https://console.example", False),
        ("http://console.example", True),
        ("http://192.0.2.1:8000", True),
    ],
)
def test_plain_http_to_another_machine_is_allowed_by_name_and_warned_of(
    console: Client, address: str, exposed: bool
) -> None:
    with override_settings(PUBLIC_URL_IS_SET=True, PUBLIC_URL=address):
        page = console.get(ADDRESS)
    assert ("This address is plain HTTP" in text(page)) == exposed
    desktop = json.loads(blocks(address)["claude-desktop"][0])["mcpServers"]["orkestr"]
    assert ("--allow-http" in desktop["args"]) == exposed


# Run as they are ----------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[str]:
    """An MCP server of the SDK's own, at our path, that wants TOKEN; its address."""
    server = MCPServer("made-for-a-test")

    @server.tool()
    def greet() -> str:
        """Says hello."""
        return "hello"

    app = guarded(server.streamable_http_app(streamable_http_path=MCP_PATH))
    web = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None))
    thread = threading.Thread(target=web.run)
    thread.start()
    try:
        while not web.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = web.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}{MCP_PATH}"
    finally:
        web.should_exit = True
        thread.join()


def guarded(app: ASGIApp) -> ASGIApp:
    """Answers 401 to whoever does not bring the token."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        wanted = (b"authorization", f"Bearer {TOKEN}".encode())
        if scope["type"] == "http" and wanted not in scope["headers"]:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"who are you?"})
            return
        await app(scope, receive, send)

    return guard


def without_proxies() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}


def test_the_python_program_lists_the_tools(endpoint: str, tmp_path: Path) -> None:
    program, shell = blocks(endpoint)["python"]
    (tmp_path / "list_tools.py").write_text(program)
    # As in the snippet, with our Python and without installing.
    _, exported, run = shell.splitlines()
    assert run.split()[0] == "python"
    line = f"{exported}\n{shlex.quote(sys.executable)} {run.split()[1]}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=without_proxies(), capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("greet - Says hello.\n", 0), done.stderr


@pytest.mark.parametrize(("token", "answer"), [(TOKEN, "serverInfo"), ("ork_no", "who are you?")])
def test_the_curl_line_asks_the_server(endpoint: str, token: str, answer: str) -> None:
    line = blocks(endpoint, token)["curl"][0]
    done = subprocess.run(
        ["bash", "-c", line], env=without_proxies(), capture_output=True, text=True, timeout=60
    )
    assert answer in done.stdout, done.stderr


def test_our_tokens_need_no_quoting() -> None:
    """They stand in double quotes and in ``export`` as they are."""
    for token in (tokens.new_token()[0], connect.PLACEHOLDER):
        assert re.fullmatch(r"ork_\w+", token, re.ASCII)
