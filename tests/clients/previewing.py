"""A server in a sandbox, and a visitor of its preview."""

from __future__ import annotations

from typing import Any

import httpx
from orkestr import Sandbox

from tests.stack import Stack, wait_for

# What a dev server does: answers, streams events, takes bodies, speaks WebSocket, sets cookies.
SERVER = r"""
import asyncio, base64, hashlib, json, sys

async def serve(reader, writer):
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *rest = head.split("\r\n")
    method, target, _ = line.split(" ")
    fields = [each.split(": ", 1) for each in rest if each]
    headers = dict(fields)
    def say(body, *more):
        writer.write("\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *more, "", ""])
                     .encode() + body)
    if target == "/events":
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await writer.drain()
        await reader.read(1)
    elif target == "/upload":
        digest, left = hashlib.sha256(), int(headers["content-length"])
        while left and (data := await reader.read(min(left, 65536))):
            digest.update(data)
            left -= len(data)
        say(digest.hexdigest().encode())
    elif target == "/socket":
        key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        writer.write(("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                      f"Connection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n").encode())
        first, second = await reader.readexactly(2)
        mask = await reader.readexactly(4)
        text = bytes(b ^ mask[i % 4] for i, b in enumerate(await reader.readexactly(second & 127)))
        writer.write(b"\x81" + bytes([len(text) + 5]) + b"echo " + text)
        await writer.drain()
        await reader.read(1)
    elif target == "/page":
        page = (b"<!doctype html><title>Inside</title><p id=said></p><script>"
                b"const s = new WebSocket(`ws://${location.host}/socket`);"
                b"s.onopen = () => s.send('hello');"
                b"s.onmessage = (m) => { document.getElementById('said').textContent ="
                b" m.data + ' [' + document.cookie + ']'; };</script>")
        say(page, "Content-Type: text/html", "Set-Cookie: own=1; Domain=localhost; Path=/")
    else:
        say(json.dumps({"name": sys.argv[2], "target": target, "headers": fields}).encode())
    await writer.drain()
    writer.close()

async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()

asyncio.run(main())
"""
PORT = 3000


def start_server(sandbox: Sandbox, name: str = "here") -> None:
    """Have a server listen on the sandbox's loopback."""
    sandbox.files.write("/workspace/server.py", SERVER)
    sandbox.exec(f"python3 /workspace/server.py {PORT} {name}", background=True)
    listens = f"import socket; socket.create_connection(('127.0.0.1', {PORT})).close()"
    wait_for(lambda: sandbox.exec(f'python3 -c "{listens}"').exit_code == 0, 60)


class Visitor:
    """A client of one preview, which knows no token and no name service."""

    def __init__(self, stack: Stack, host: str) -> None:
        self.host = host
        self._address = f"http://127.0.0.1:{stack.layout.preview_port}"
        self.http = httpx.Client(base_url=self._address, trust_env=False, timeout=60)

    def get(self, path: str = "/", **headers: str) -> httpx.Response:
        # All previews have one address here, to which the client would send them all.
        self.http.cookies.clear()
        return self.http.get(path, headers={"Host": self.host, **headers})

    def stream(self, path: str) -> Any:
        return self.http.stream("GET", path, headers={"Host": self.host})
