"""Addresses of files by the official SDK, and what passes through them, on a live installation."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from orkestr import Sandbox
from orkestr.errors import OrkestrError

from tests.clients.making import Sandboxes
from tests.stack import Stack, wait_for

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 4096
PATH = "/workspace/big.bin"
# Far less than what passes, and more than the buffers of a connection and Python's arenas.
FEW_BYTES = 24 * MIB


@pytest.fixture
def anybody() -> Iterator[httpx.Client]:
    """A client that knows no token."""
    with httpx.Client(timeout=120, trust_env=False) as client:
        yield client


def pieces(count: int, before: Callable[[int], object] | None = None) -> Iterator[bytes]:
    for number in range(count):
        if before is not None:
            before(number)
        yield PIECE


def send(client: httpx.Client, url: str, count: int) -> httpx.Response:
    length = {"Content-Length": str(count * MIB)}
    return client.put(url, content=pieces(count), headers=length)


def open_raw(url: str, head: str) -> socket.socket:
    """A connection that has sent a request's head, with ``{path}`` and ``{host}`` filled in."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=60)
    connection.sendall(head.format(path=parts.path, host=parts.netloc).encode())
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that the server says until it closes the connection."""
    said = b""
    while part := connection.recv(65536):
        said += part
    return said


class Watched:
    """The web processes and the agent, by what they hold."""

    def __init__(self, stack: Stack) -> None:
        web = stack.pid("web")
        children = Path(f"/proc/{web}/task/{web}/children").read_text().split()
        self.pids = [stack.pid("agent"), web, *map(int, children)]
        self._before = self._resident()

    def _resident(self) -> dict[int, int]:
        return {pid: int(self._status(pid, "VmRSS")) * 1024 for pid in self.pids}

    def _status(self, pid: int, name: str) -> str:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))

    def grown(self) -> int:
        """How many bytes more than at first the one has that has grown most."""
        now = self._resident()
        return max(now[pid] - self._before[pid] for pid in self.pids)

    def threads(self) -> int:
        return sum(int(self._status(pid, "Threads")) for pid in self.pids)

    def descriptors(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)


def names(sandbox: Sandbox) -> list[str]:
    listed: str = sandbox.exec("ls -A /workspace").stdout
    return listed.split()


def transferring(sandbox: Sandbox) -> int:
    """How many processes are in the sandbox that serve a transfer."""
    listed: str = sandbox.exec("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").stdout
    return listed.count("hostruntime.container.lxc")


def test_the_sdks_addresses_carry_a_file_both_ways(sandbox: Sandbox, anybody: httpx.Client) -> None:
    asked = datetime.now(UTC)
    made = sandbox.files.presign_upload(PATH, expires_in=300)
    assert (made.method, made.path) == ("PUT", PATH)
    assert 290 < (made.expires_at - asked).total_seconds() < 310
    sent = send(anybody, made.url, 40)
    assert (sent.status_code, sent.json()) == (200, {"path": PATH, "bytes_written": 40 * MIB})
    digest = hashlib.sha256(PIECE * 40).hexdigest()
    seen = sandbox.exec(f"sha256sum {PATH} | cut -d' ' -f1; stat -c '%a %s' {PATH}").stdout
    assert seen.split() == [digest, "644", str(40 * MIB)]
    made = sandbox.files.presign_download(PATH)
    assert (made.method, made.path) == ("GET", PATH)
    got = anybody.get(made.url)
    assert hashlib.sha256(got.content).hexdigest() == digest
    assert got.headers["content-length"] == str(40 * MIB)
    part = anybody.get(made.url, headers={"Range": "bytes=1048570-1048585"})
    assert (part.status_code, part.content) == (206, (PIECE * 2)[MIB - 6 : MIB + 10])
    assert part.headers["content-range"] == f"bytes 1048570-1048585/{40 * MIB}"


def test_an_ordinary_curl_sends_resumes_and_saves(sandbox: Sandbox, tmp_path: Path) -> None:
    local, back = tmp_path / "local", tmp_path / "back"
    local.write_bytes(PIECE * 5)
    upload, download = sandbox.files.presign_upload(PATH), sandbox.files.presign_download(PATH)
    done = subprocess.run(
        ["curl", "-sST", local, upload.url], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["bytes_written"] == 5 * MIB
    back.write_bytes(PIECE)
    subprocess.run(["curl", "-fsS", "-C", "-", "-o", back, download.url], check=True)
    assert back.read_bytes() == PIECE * 5


def test_memory_threads_and_connections_stay_whatever_passes(
    stack: Stack, sandbox: Sandbox, anybody: httpx.Client
) -> None:
    for _ in range(4):
        send(anybody, sandbox.files.presign_upload(PATH).url, 4)
        anybody.get(sandbox.files.presign_download(PATH).url)
    watched, most = Watched(stack), []
    upload, download = sandbox.files.presign_upload(PATH), sandbox.files.presign_download(PATH)

    def look(number: int) -> None:
        if number % 50 == 49:
            most.append(watched.grown())

    length = {"Content-Length": str(400 * MIB)}
    sent = anybody.put(upload.url, content=pieces(400, look), headers=length)
    assert sent.json()["bytes_written"] == 400 * MIB
    passed = 0
    with anybody.stream("GET", download.url) as got:
        for number, piece in enumerate(got.iter_raw(MIB)):
            look(number)
            passed += len(piece)
    assert passed == 400 * MIB
    assert len(most) == 16
    assert max(most) < FEW_BYTES


def test_a_slow_reader_and_a_slow_sender_hold_nothing_but_their_connection(
    stack: Stack, sandbox: Sandbox, anybody: httpx.Client
) -> None:
    send(anybody, sandbox.files.presign_upload(PATH).url, 200)
    other = sandbox.files.presign_upload("/workspace/other")
    download = sandbox.files.presign_download(PATH)
    watched, threads = Watched(stack), Watched(stack).threads()
    get = "GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n"
    put = "PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 104857600\r\n\r\n"
    readers = [open_raw(download.url, get) for _ in range(6)]
    sender = open_raw(other.url, put)
    sender.sendall(PIECE)
    time.sleep(2)
    assert watched.grown() < FEW_BYTES
    # A thread that was needed at the beginning ends after half a minute without anything to do.
    wait_for(lambda: watched.threads() <= threads, 50)
    assert database_connections(stack) == 0
    # It does not keep others waiting.
    assert sandbox.exec("echo here").stdout == "here\n"
    descriptors = watched.descriptors()
    for connection in (*readers, sender):
        connection.close()
    wait_for(lambda: watched.descriptors() <= descriptors - 14, 30)
    wait_for(lambda: transferring(sandbox) == 0, 30)
    assert names(sandbox) == ["big.bin"]


def database_connections(stack: Stack) -> int:
    """How many of the database's connections are in a transaction for more than a second."""
    sql = (
        'from django.db import connection as c; k = c.cursor(); k.execute("SELECT count(*) FROM '
        "pg_stat_activity WHERE state LIKE 'idle in%' AND now() - state_change > '1 s'\"); "
        "print(k.fetchone()[0])"
    )
    done = stack.manage("shell", "-v0", "-c", sql)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


def test_a_client_that_gives_up_leaves_the_old_file_and_can_try_again(
    sandbox: Sandbox, anybody: httpx.Client
) -> None:
    sandbox.files.write(PATH, "old")
    made = sandbox.files.presign_upload(PATH)

    def leave(number: int) -> None:
        if number == 20:
            assert names(sandbox) == ["big.bin"]
            raise KeyError("enough")

    with pytest.raises(KeyError):
        length = {"Content-Length": str(40 * MIB)}
        anybody.put(made.url, content=pieces(40, leave), headers=length)
    wait_for(lambda: transferring(sandbox) == 0, 30)
    assert (names(sandbox), sandbox.files.read(PATH)) == (["big.bin"], "old")
    wait_for(lambda: send(anybody, made.url, 3).status_code == 200, 30)
    assert sandbox.exec(f"stat -c %s {PATH}").stdout == f"{3 * MIB}\n"


def test_what_is_refused_is_refused_before_it_is_sent(
    sandbox: Sandbox, anybody: httpx.Client
) -> None:
    made = sandbox.files.presign_upload(PATH)
    send(anybody, made.url, 1)
    put = "PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99999999999\r\n"
    for more in ("Expect: 100-continue\r\n\r\n", "\r\n"):
        with open_raw(made.url, put + more) as connection:
            said = answer(connection)
        assert said.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert b'"code": "address_used"' in said
    fresh = sandbox.files.presign_upload("/workspace/huge")
    with open_raw(fresh.url, put + "\r\n") as connection:
        connection.sendall(PIECE)
        said = answer(connection)
    assert b'"code": "no_space"' in said
    assert names(sandbox) == ["big.bin"]
    # A client that goes on sending still gets to read why.
    refused = send(anybody, made.url, 30)
    assert (refused.status_code, refused.json()["code"]) == (403, "address_used")
    assert anybody.get(sandbox.files.presign_download(PATH).url).content == PIECE


def test_a_client_that_asks_first_is_told_to_go_on(sandbox: Sandbox) -> None:
    made = sandbox.files.presign_upload(PATH)
    head = "PUT {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 3\r\nExpect: 100-continue\r\n"
    with open_raw(made.url, head + "\r\n") as connection:
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        # And its next request on the same connection is one of its own.
        connection.sendall(b"abcGET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Connection: close\r\n\r\n")
        said = answer(connection)
    assert said.count(b"HTTP/1.1 200 OK") == 2
    assert b'"bytes_written": 3' in said
    assert sandbox.files.read(PATH) == "abc"


def test_a_file_that_is_cut_meanwhile_is_no_whole_download(
    sandbox: Sandbox, anybody: httpx.Client
) -> None:
    sandbox.exec(f"truncate -s 200M {PATH}")
    made = sandbox.files.presign_download(PATH)
    with (
        pytest.raises(httpx.TransportError),
        anybody.stream("GET", made.url) as got,
    ):
        for number, _ in enumerate(got.iter_raw(MIB)):
            if number == 0:
                sandbox.exec(f"truncate -s 0 {PATH}")


def test_a_sandbox_that_ends_ends_its_transfers(
    sandboxes: Sandboxes, anybody: httpx.Client
) -> None:
    sandbox = sandboxes.boot("debian-12")
    made = sandbox.files.presign_upload(PATH)
    ended = threading.Thread(target=sandbox.terminate)

    def end(number: int) -> None:
        if number == 10:
            ended.start()
            ended.join()

    length = {"Content-Length": str(300 * MIB)}
    refused = anybody.put(made.url, content=pieces(300, end), headers=length)
    assert (refused.status_code, refused.json()["code"]) == (409, "sandbox_not_running")


@pytest.mark.parametrize("program", ["agent", "web"])
def test_what_is_killed_meanwhile_leaves_the_old_file(
    stack: Stack, sandbox: Sandbox, anybody: httpx.Client, program: str
) -> None:
    sandbox.files.write(PATH, "old")
    made, old = sandbox.files.presign_upload(PATH), stack.pid(program)

    def kill(number: int) -> None:
        if number == 20:
            stack.kill(program)

    length = {"Content-Length": str(300 * MIB)}
    try:
        refused = anybody.put(made.url, content=pieces(300, kill), headers=length)
    except httpx.TransportError:
        assert program == "web"
    else:
        assert (refused.status_code, refused.json()["code"]) == (503, "host_unavailable")
    stack.wait_until_restarted(program, old, 60)
    wait_for(lambda: answers(sandbox), 60, stack.explain)
    wait_for(lambda: transferring(sandbox) == 0, 30)
    assert (names(sandbox), sandbox.files.read(PATH)) == (["big.bin"], "old")
    if program == "agent":
        assert send(anybody, made.url, 2).status_code == 200


def answers(sandbox: Sandbox) -> bool:
    """Whether commands are run again."""
    try:
        return bool(sandbox.exec("true").exit_code == 0)
    except (OrkestrError, httpx.HTTPError):
        return False
