"""What the agent believes of a bridge, and what a bridge makes of a kernel's messages."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from pathlib import Path
from socket import socket, socketpair
from types import SimpleNamespace
from typing import Any

import pytest

from hostruntime.container import inside_bridge
from hostruntime.container.inside_bridge import Unavailable, kernel_command
from hostruntime.container.inside_outputs import Kept, Outputs
from hostruntime.host.paths import StatePaths
from hostruntime.sandbox import bridges
from hostruntime.sandbox.bridges import Bridge, BridgeGone, listen
from hostruntime.sandbox.interpreter import Access, Interpreter, Record, _write_record
from hostruntime.wire.interpreter import CodeFrame, RunCode

DONE = b'{"kind": "done", "execution_count": 1, "duration_ms": 3}\n'
STREAM = b'{"kind": "stream", "text": "x", "x_new": 1}\n'


@contextmanager
def saying(directory: Path, say: Callable[[socket], None]) -> Iterator[list[bytes]]:
    """A bridge that reads a request, and then does what it likes; the requests it got."""
    listener, requests = listen(directory), []

    def serve() -> None:
        with listener.accept()[0] as connection:
            requests.append(connection.makefile("rb").readline())
            with suppress(OSError):
                say(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield requests
    finally:
        listener.close()
        thread.join()


async def frames_of(directory: Path) -> list[CodeFrame]:
    async with Bridge.connect(directory) as bridge, aclosing(bridge.run("1", 5.0)) as frames:
        return [frame async for frame in frames]


async def test_a_run_is_its_frames_until_done(tmp_path: Path) -> None:
    with saying(tmp_path, lambda c: c.sendall(STREAM + DONE + STREAM)) as requests:
        first, last = await frames_of(tmp_path)
    assert (first.text, last.kind, last.execution_count) == ("x", "done", 1)
    assert json.loads(requests[0]) == {"op": "run", "code": "1", "seconds": 5.0, "silent": False}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]\n",
        b"null\n",
        b'"done"\n',
        b"\xff\xfe\n",
        b'{"kind": "started"}\n',
        b'{"kind": "end"}\n',
        b'{"kind": "done", "duration_ms": -1}\n',
        b'{"kind": "done", "duration_ms": 1e400}\n',
        b'{"kind": "done", "execution_count": "1"}\n',
        b'{"kind": "done", "truncated": ' + json.dumps(["x"] * 99).encode() + b"}\n",
        b'{"kind": "done", "lost": "' + b"x" * 9999 + b'"}\n',
        b'{"kind": "stream", "stream": "stdin"}\n',
        b'{"kind": "stream", "text": "\\ud800"}\n',
        b'{"kind": "result", "result": {"png": "no base64"}}\n',
        b'{"kind": "result", "result": {"json": "text"}}\n',
        b'{"kind": "result", "result": {"json": ' + b"[" * 5000 + b"]" * 5000 + b"}}\n",
        b'{"kind": "result", "result": {"json": [' + b"9" * 9999 + b"]}}\n",
        b'{"kind": "error", "error": {"name": "x", "value": "y", "traceback": "z"}}\n',
    ],
    ids=lambda line: line[:40].decode(errors="replace"),
)
async def test_what_is_no_frame_ends_it(tmp_path: Path, line: bytes) -> None:
    with saying(tmp_path, lambda c: c.sendall(line)), pytest.raises(BridgeGone):
        await frames_of(tmp_path)


async def test_a_flood_is_not_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridges, "MAX_LINE_BYTES", 100_000)
    monkeypatch.setattr(bridges, "MAX_RUN_BYTES", 2_000_000)
    sent = []

    def flood(piece: bytes) -> Callable[[socket], None]:
        def send(connection: socket) -> None:
            while True:
                sent.append(connection.send(piece))

        return send

    for piece in (b"x" * 10_000, STREAM * 1000):
        sent.clear()
        with saying(tmp_path, flood(piece)), pytest.raises(BridgeGone):
            await frames_of(tmp_path)
        assert sum(sent) < 8_000_000
        (tmp_path / "socket").unlink()


async def test_who_leaves_closes_the_connection(tmp_path: Path) -> None:
    ended = threading.Event()

    def wait(connection: socket) -> None:
        connection.sendall(STREAM)
        assert connection.recv(1) == b""
        ended.set()

    with saying(tmp_path, wait):
        async with Bridge.connect(tmp_path) as bridge, aclosing(bridge.run("1", 5.0)) as frames:
            assert (await anext(frames)).kind == "stream"
        assert await asyncio.to_thread(ended.wait, 10)


async def test_without_a_bridge_there_is_nobody(tmp_path: Path) -> None:
    with pytest.raises(BridgeGone):
        await frames_of(tmp_path)
    listen(tmp_path).close()
    with pytest.raises(BridgeGone):
        await frames_of(tmp_path)


async def test_one_that_is_busy_is_waited_for(tmp_path: Path) -> None:
    """Those who left wait in its queue: it is not to be taken for one that has ended."""
    listener = listen(tmp_path)
    with ExitStack() as others:
        others.enter_context(listener)
        while True:
            with suppress(BlockingIOError):
                others.enter_context(bridges._connect(tmp_path))
                continue
            break
        connecting = asyncio.create_task(bridges._wait_for(tmp_path))
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert not connecting.done()
        others.enter_context(listener.accept()[0])
        (await connecting).close()


def test_the_name_of_the_socket_says_nothing_of_the_host(tmp_path: Path) -> None:
    with listen(tmp_path) as listener:
        assert str(tmp_path) not in listener.getsockname()
    assert (tmp_path / "socket").is_socket()


# The bridge's own part ---------------------------------------------------------------------------


def stream(text: str, name: str = "stdout") -> tuple[str, dict[str, Any], bool]:
    return "stream", {"name": name, "text": text}, True


def result(**data: Any) -> tuple[str, dict[str, Any], bool]:
    mimes = {"png": "image/png", "json": "application/json", "text": "text/plain"}
    return "display_data", {"data": {mimes[key]: value for key, value in data.items()}}, True


def test_what_is_too_much_is_cut_and_said() -> None:
    outputs = Outputs()
    sent = [outputs.lines(*stream("x" * 1_500_000)) for _ in range(3)]
    assert sum(len(line["text"]) for [line] in sent[:2]) == 2 * 1024 * 1024
    assert sent[2] == []
    assert outputs.lines(*stream("y", "stderr"))[0]["text"] == "y"
    [line] = outputs.lines(*result(text="t" * 300_000, png="e" * 5_000_000))
    assert len(line["result"]["text"]) == 256 * 1024
    assert set(outputs.truncated) == {"stdout", "result.text", "result.png"}
    many = [outputs.lines(*result(text="r")) for _ in range(100)]
    assert sum(map(len, many)) == 63
    assert "results" in outputs.truncated


def test_what_is_printed_between_runs_is_kept_within_bounds() -> None:
    kept, outputs = Kept(), Outputs()
    assert kept.take(outputs) == []
    for number in range(100):
        kept.add({"name": "stderr", "text": f"{number:02}" * 512}, whole=True)
    lines = kept.take(outputs)
    assert [line["text"][:2] for line in lines] == [str(number) for number in range(36, 100)]
    assert {line["stream"] for line in lines} == {"stderr"}
    assert outputs.truncated == ["stdout"]
    assert kept.take(Outputs()) == []


def test_an_exception_is_plain_text_within_bounds() -> None:
    outputs = Outputs()
    traceback = ["\x1b[31mred\x1b[0m", *(f"line {n}" for n in range(1000))]
    content = {"ename": "E" * 999, "evalue": "v" * 99_999, "traceback": traceback}
    error = outputs.failure(content)["error"]
    assert error["traceback"][0] == "red"
    assert len(error["traceback"]) == 101
    assert (len(error["name"]), len(error["value"])) == (200, 16 * 1024)
    assert outputs.truncated == ["error"]
    odd: dict[str, Any] = {"ename": None, "evalue": 3, "traceback": 5}
    assert outputs.failure(odd)["error"] == {"name": "Error", "value": "3", "traceback": []}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"a": [1, float("nan"), 2**70]}, {"a": [1, None, str(2**70)]}),
        ("text", None),
        (3, None),
        ({1: 2}, {"1": 2}),
    ],
)
def test_json_is_json_everywhere(given: Any, kept: Any) -> None:
    lines = Outputs().lines(*result(json=given))
    assert lines == ([] if kept is None else [{"kind": "result", "result": {"json": kept}}])


def test_json_that_is_too_deep_is_left_out() -> None:
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    assert Outputs().lines(*result(json=deep, text="x")) == [
        {"kind": "result", "result": {"text": "x"}}
    ]


@pytest.mark.parametrize("data", [None, [], {"text/plain": None}, {"image/png": 5}, {"x": "y"}])
def test_what_is_no_representation_is_no_result(data: Any) -> None:
    assert Outputs().lines("execute_result", {"data": data}, whole=True) == []


@pytest.mark.parametrize(
    "spec",
    [
        "[]",
        "{",
        "[" * 100_000,
        '{"argv": "node", "language": "javascript"}',
        '{"argv": [], "language": "javascript"}',
        '{"argv": [1], "language": "javascript"}',
        '{"argv": ["a\\u0000"], "language": "javascript"}',
        '{"argv": ["node"], "language": ["javascript"]}',
        '{"argv": ["node"]}',
        '{"argv": ["node"], "language": "other"}',
    ],
)
def test_a_kernel_specification_is_one_or_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    monkeypatch.setattr(inside_bridge, "_KERNEL_DIRECTORIES", (str(tmp_path),))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kernel.json").write_text(spec)
    with pytest.raises(Unavailable):
        kernel_command("javascript", "file")
    (tmp_path / "b").mkdir()
    good = {"argv": ["node", "{connection_file}"], "language": "JavaScript"}
    (tmp_path / "b" / "kernel.json").write_text(json.dumps(good))
    assert kernel_command("javascript", "file") == (["node", "file"], False)


def test_python_keeps_no_history_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    argv, in_files = kernel_command("python", "file")
    assert in_files
    assert argv[1:5] == ["-m", "ipykernel_launcher", "-f", "file"]
    assert "--HistoryManager.hist_file=:memory:" in argv


async def test_a_run_waits_for_a_restart_of_its_context(tmp_path: Path) -> None:
    """All there is of a context is removed first, and a run is not to take it for none."""
    paths = StatePaths(tmp_path / "state").ensure()
    interpreter = Interpreter(paths, None)  # type: ignore[arg-type]
    directory = paths.sandboxes / "sbx" / "contexts" / "mine"
    directory.parent.mkdir(parents=True)
    access = Access("sbx", None, lambda: False)  # type: ignore[arg-type]

    async def run() -> list[CodeFrame]:
        async with aclosing(interpreter.run(access, RunCode("1", context_id="mine"))) as frames:
            return [frame async for frame in frames]

    async with interpreter._changing("sbx", "mine"):
        running = asyncio.create_task(run())
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not running.done()
        _write_record(directory, Record("mine", "python", "/", 1.0))
        stack = ExitStack()
        stack.enter_context(saying(directory, lambda c: c.sendall(DONE)))
    with stack:
        assert [frame.kind for frame in await running] == ["started", "done"]


def test_a_bridge_waits_for_its_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent sends it after the bridge's text: it may come later than the bridge gets here."""
    connection, other = socketpair()
    timeouts: list[float | None] = []
    started: list[object] = []

    def readline(_: int) -> bytes:
        timeouts.append(connection.gettimeout())
        return b'{"op": "start"}\n'

    def start(_: object, request: object) -> None:
        started.append(request)

    # The test's own output is not to be closed.
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(inside_bridge, "start", start)
    before = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    with other:
        inside_bridge.main(socket(), connection, SimpleNamespace(readline=readline))
    for left in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - before:
        with suppress(OSError):
            os.close(left)
    assert timeouts == [None]
    assert started == [{"op": "start"}]
