"""Configuration snippets that connect common MCP clients to our endpoint.

Each follows the client's own documentation: code.claude.com/docs/en/mcp (Claude Code), the README
of ``mcp-remote`` (Claude Desktop, which starts programs only), cursor.com/docs/mcp,
code.visualstudio.com/docs/copilot/reference/mcp-configuration, Codex's docs/config.md, and for
the requests themselves the MCP specification, "Transports: Streamable HTTP".
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# A placeholder in the form of our tokens.
PLACEHOLDER = "ork_YOUR_TOKEN"
# The revision that ``initialize`` requests; the server answers with its own.
PROTOCOL_VERSION = "2025-06-18"
VARIABLE = "ORKESTR_API_KEY"
# The hosts that mcp-remote calls over plain HTTP without an option.
LOOPBACK = ("localhost", "127.0.0.1")

PROGRAM = """\
import asyncio
import os

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

URL = {url}
HEADERS = {{"Authorization": f"Bearer {{os.environ['{variable}']}}"}}


async def main() -> None:
    # A tool may take a while: building a template takes minutes.
    patience = httpx2.Timeout(30, read=300)
    async with httpx2.AsyncClient(headers=HEADERS, timeout=patience) as http:
        async with Client(streamable_http_client(URL, http_client=http)) as client:
            for tool in (await client.list_tools()).tools:
                print(tool.name, "-", tool.description)


asyncio.run(main())
"""


@dataclass(frozen=True)
class Block:
    """A text to copy and ``where`` to put it; ``secret`` is the secret part of it."""

    where: str
    text: str
    secret: str

    def parts(self) -> list[str]:
        """The text around the secret, so that the page can mark it."""
        return self.text.split(self.secret)


@dataclass(frozen=True)
class Guide:
    """How to connect one client. ``key`` is its form value; ``hint`` has code in backticks."""

    key: str
    name: str
    hint: str
    blocks: tuple[Block, ...]


def guides(url: str, token: str) -> list[Guide]:
    """The guides of all clients, with the endpoint's ``url`` and ``token`` quoted as needed."""
    return [
        claude_code(url, token),
        claude_desktop(url, token),
        cursor(url, token),
        vs_code(url, token),
        codex(url, token),
        python(url, token),
        curl(url, token),
        other(url, token),
    ]


def claude_code(url: str, token: str) -> Guide:
    """``--header`` takes everything that follows it, so it comes last."""
    line = (
        f"claude mcp add --transport http orkestr {shlex.quote(url)} "
        f'--header "Authorization: Bearer {token}"'
    )
    hint = (
        "Adds the server to the current project. For all projects, put `--scope user` after `add`. "
        "`claude mcp list` then says whether it connects, and `/mcp` in a session lists its tools."
    )
    return Guide("claude-code", "Claude Code", hint, (Block("In a terminal", line, token),))


def claude_desktop(url: str, token: str) -> Guide:
    """Through ``mcp-remote``; its header has no space, where Claude on Windows would split it."""
    arguments = ["-y", "mcp-remote", url, "--header", "Authorization:${AUTH}"]
    if is_exposed(url):
        arguments.append("--allow-http")
    server = {"command": "npx", "args": arguments, "env": {"AUTH": f"Bearer {token}"}}
    hint = (
        "Settings → Developer → Edit Config opens the file. It needs Node.js 18 or newer. "
        "Restart Claude Desktop afterwards."
    )
    block = Block(
        "claude_desktop_config.json", pretty_json({"mcpServers": {"orkestr": server}}), token
    )
    return Guide("claude-desktop", "Claude Desktop", hint, (block,))


def cursor(url: str, token: str) -> Guide:
    """Cursor recognizes a remote server by its ``url``."""
    server = {"url": url, "headers": {"Authorization": f"Bearer {token}"}}
    hint = (
        "In the project, or `~/.cursor/mcp.json` for all of yours. The file holds the token: "
        "keep it out of version control."
    )
    block = Block(".cursor/mcp.json", pretty_json({"mcpServers": {"orkestr": server}}), token)
    return Guide("cursor", "Cursor", hint, (block,))


def vs_code(url: str, token: str) -> Guide:
    """VS Code asks for the token and stores it, so the file can be shared."""
    token_input = {
        "type": "promptString",
        "id": "orkestr-token",
        "description": "Orkestr API token",
        "password": True,
    }
    header = {"Authorization": "Bearer ${input:orkestr-token}"}
    server = {"type": "http", "url": url, "headers": header}
    hint = (
        "VS Code asks for the token when it first starts the server, and keeps it safe: "
        "the file holds no secret and may be committed."
    )
    blocks = (
        Block(
            ".vscode/mcp.json",
            pretty_json({"inputs": [token_input], "servers": {"orkestr": server}}),
            token,
        ),
        Block("When VS Code asks", token, token),
    )
    return Guide("vs-code", "VS Code", hint, blocks)


def codex(url: str, token: str) -> Guide:
    """Codex reads the token only from the environment."""
    lines = (
        "[mcp_servers.orkestr]",
        f"url = {quote(url)}",
        f"bearer_token_env_var = {quote(VARIABLE)}",
    )
    hint = "The variable must be set where Codex is started. `/mcp` in a session lists its tools."
    blocks = (
        Block("~/.codex/config.toml", "\n".join(lines), token),
        Block("In the shell that starts Codex", export_command(token), token),
    )
    return Guide("codex", "Codex", hint, blocks)


def python(url: str, token: str) -> Guide:
    """A complete program with the official SDK (2.3)."""
    program = PROGRAM.format(url=quote(url), variable=VARIABLE)
    blocks = (
        Block("list_tools.py", program.rstrip("\n"), token),
        Block(
            "In a terminal",
            f"pip install 'mcp>=2.3,<3'\n{export_command(token)}\npython list_tools.py",
            token,
        ),
    )
    return Guide("python", "Python", "With the official SDK: it lists the tools.", blocks)


def curl(url: str, token: str) -> Guide:
    """The first request of any client, by hand."""
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": PROTOCOL_VERSION,
            "capabilities": {},
            "clientInfo": {"name": "curl", "version": "1"},
        },
    }
    lines = (
        f"curl -sS -X POST {shlex.quote(url)}",
        f'-H "Authorization: Bearer {token}"',
        '-H "Content-Type: application/json"',
        '-H "Accept: application/json, text/event-stream"',
        f"-d '{json.dumps(body)}'",
    )
    hint = (
        "Checks the URL and the token. A working response contains `serverInfo`; "
        "`401` means that the token is wrong, expired or revoked."
    )
    block = Block("In a terminal", " \\\n  ".join(lines), token)
    return Guide("curl", "curl", hint, (block,))


def other(url: str, token: str) -> Guide:
    """The format that most clients read."""
    server = {"type": "http", "url": url, "headers": {"Authorization": f"Bearer {token}"}}
    hint = (
        "Most clients read this form. What any of them needs: the transport Streamable HTTP, "
        "the address, and the header `Authorization`. There is no OAuth."
    )
    block = Block("mcp.json", pretty_json({"mcpServers": {"orkestr": server}}), token)
    return Guide("other", "Other clients", hint, (block,))


def pretty_json(value: dict[str, Any]) -> str:
    """Indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def quote(text: str) -> str:
    """A string literal for TOML and Python: JSON's, as both support its escapes but surrogates."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def export_command(token: str) -> str:
    """The shell command that exports the token."""
    return f"export {VARIABLE}={token}"


def is_exposed(url: str) -> bool:
    """Whether it is plain HTTP to another machine, where the token can be read in transit."""
    found = urlsplit(url)
    return found.scheme == "http" and found.hostname not in LOOPBACK
