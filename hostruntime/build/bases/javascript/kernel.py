"""A Jupyter kernel for JavaScript, which runs it in Node.js (18 or later).

Not imported by the project: it is a file of the base ``code-interpreter``, beside its kernel
specification, and is run by the image's Python with ipykernel, which speaks Jupyter's protocol.
The code runs in one Node process for the kernel's life (``runner.cjs``), which this passes code to
and whose output and answers it passes on.  It is in this process's group, so an interrupt (SIGINT)
reaches Node, and what that has started, by itself.  When Node ends, so does the kernel.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from ipykernel.kernelapp import IPKernelApp  # type: ignore[import-not-found]
from ipykernel.kernelbase import Kernel  # type: ignore[import-not-found]

RUNNER = Path(__file__).with_name("runner.cjs")
# More characters of a run's output than anybody shows; the rest is read and dropped.
MAX_STREAM = 3 * 1024 * 1024
MAX_RESULTS = 100
# A subscriber misses what is more than a thousand messages ahead of it (ZMQ_SNDHWM), so that what
# is printed within this time, or as much as this, is one.
FLUSH_SECONDS, FLUSH_CHARACTERS = 0.02, 64 * 1024
READ_BYTES = 64 * 1024
# What Node has printed before an answer is in a pipe, which holds no more than this many reads.
DRAIN_READS = 32
STREAMS = ("stdout", "stderr")


class NodeProcess:
    """Node, and the pipes to it."""

    def __init__(self) -> None:
        requests, self.requests = os.pipe()
        self.answers, answers = os.pipe()
        self.process = subprocess.Popen(
            [*command(), str(requests), str(answers)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(requests, answers),
        )
        os.close(requests)
        os.close(answers)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.streams = dict(zip(STREAMS, (self.process.stdout, self.process.stderr), strict=True))
        for descriptor in (self.answers, *(each.fileno() for each in self.streams.values())):
            os.set_blocking(descriptor, False)

    def send(self, request: dict[str, Any]) -> None:
        """Send a request; blocks until Node reads.  Raises OSError."""
        data = json.dumps(request).encode() + b"\n"
        while data:
            data = data[os.write(self.requests, data) :]

    def say_why_it_ended(self) -> int:
        """Print it, for whoever started the kernel; the status to end with."""
        status = self.process.wait()
        os.write(1, f"Node.js has ended with status {status}.\n".encode())
        return status if status > 0 else 1


def command() -> list[str]:
    """Node with its REPL's parser, and the program."""
    node = shutil.which("node")
    if node is None:
        sys.exit("There is no node in PATH.")
    # An older Node needs the second one for import() (https://nodejs.org/api/vm.html).
    options = ["--expose-internals", "--experimental-vm-modules", "--no-warnings"]
    return [node, *options, str(RUNNER)]


def environment() -> dict[str, str]:
    """The environment, in which packages that npm has installed globally are found."""
    defaults = {
        "NODE_PATH": "/usr/local/lib/node_modules:/usr/lib/node_modules:/usr/share/nodejs",
        # fetch() uses the proxy that everything else does (Node 22.21).
        "NODE_USE_ENV_PROXY": "1",
    }
    return {**defaults, **os.environ}


class JavaScriptKernel(Kernel):  # type: ignore[misc]
    """The kernel."""

    implementation = "orkestr-javascript"
    implementation_version = "1.0"
    banner = "JavaScript in Node.js"
    language_info = {  # noqa: RUF012 - as ipykernel declares it
        "name": "javascript",
        "mimetype": "text/javascript",
        "file_extension": ".js",
        "codemirror_mode": "javascript",
        "pygments_lexer": "javascript",
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.node = NodeProcess()
        self._attached = False
        self._answers = bytearray()
        self._streamed: dict[str, int] = {}
        self._results = 0
        # What was printed and is not sent yet, in its order: streams and texts.
        self._pending: list[tuple[str, str]] = []
        self._flushing: asyncio.TimerHandle | None = None
        self._decoders = {
            name: codecs.getincrementaldecoder("utf-8")("replace") for name in STREAMS
        }
        self._silent = False
        self._parent: dict[str, Any] = {}
        self._error: dict[str, Any] | None = None
        self._done: asyncio.Future[None] | None = None

    def pre_handler_hook(self) -> None:
        """Keep SIGINT ignored: it is for Node."""

    def post_handler_hook(self) -> None:
        """Likewise."""

    async def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: dict[str, Any] | None = None,
        allow_stdin: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        """Run code; its outputs are sent as they come."""
        loop = asyncio.get_running_loop()
        self._attach(loop)
        # What was printed between two runs belongs to the one before.
        self._flush()
        self._silent, self._error, self._streamed, self._results = silent, None, {}, 0
        self._done, self._parent = loop.create_future(), self.get_parent("shell")
        request = {"op": "run", "code": code, "number": self.execution_count}
        # What an earlier run has left behind may keep it from reading.
        await loop.run_in_executor(None, self.node.send, request)
        await self._done
        if self._error is not None:
            reply = {"ename": self._error["name"], "evalue": self._error["value"]}
            return {"status": "error", "traceback": self._error["traceback"], **reply}
        return {
            "status": "ok",
            "execution_count": self.execution_count,
            "payload": [],
            "user_expressions": {},
        }

    def do_shutdown(self, restart: bool) -> dict[str, Any]:
        """End Node."""
        self.node.process.kill()
        return {"status": "ok", "restart": restart}

    # What Node sends ---------------------------------------------------------------------------

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._attached:
            return
        self._attached = True
        for name, stream in self.node.streams.items():
            loop.add_reader(stream.fileno(), self._read_stream, loop, name)
        loop.add_reader(self.node.answers, self._read_answers)

    def _read_stream(self, loop: asyncio.AbstractEventLoop, name: str) -> bool:
        """Pass on what was printed; whether there was anything."""
        descriptor = self.node.streams[name].fileno()
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            loop.remove_reader(descriptor)
            return False
        text = self._decoders[name].decode(data)
        shown = self._streamed.get(name, 0)
        self._streamed[name] = shown + len(text)
        if text := text[: max(MAX_STREAM - shown, 0)]:
            self._print(loop, name, text)
        return True

    def _print(self, loop: asyncio.AbstractEventLoop, name: str, text: str) -> None:
        if self._pending and self._pending[-1][0] == name:
            text = self._pending.pop()[1] + text
        self._pending.append((name, text))
        if len(text) >= FLUSH_CHARACTERS:
            self._flush()
        elif self._flushing is None:
            self._flushing = loop.call_later(FLUSH_SECONDS, self._flush)

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        pending, self._pending = self._pending, []
        for name, text in pending:
            self._publish("stream", {"name": name, "text": text})

    def _read_answers(self) -> None:
        try:
            data = os.read(self.node.answers, READ_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._drain()
            os._exit(self.node.say_why_it_ended())
        self._answers += data
        *lines, rest = self._answers.split(b"\n")
        self._answers = bytearray(rest)
        for line in lines:
            self._handle(json.loads(line))

    def _drain(self) -> None:
        """Pass on what was printed before an answer."""
        loop = asyncio.get_running_loop()
        for name in STREAMS:
            for _ in range(DRAIN_READS):
                if not self._read_stream(loop, name):
                    break
        self._flush()

    def _handle(self, answer: dict[str, Any]) -> None:
        self._drain()
        kind = answer["kind"]
        if kind == "done":
            if self._done is not None and not self._done.done():
                self._done.set_result(None)
        elif kind == "error":
            self._error = answer
            content = {"ename": answer["name"], "evalue": answer["value"]}
            self._publish("error", {**content, "traceback": answer["traceback"]})
        elif self._results < MAX_RESULTS:
            self._results += 1
            content = {"data": answer["data"], "metadata": {}}
            if kind == "result":
                content["execution_count"] = self.execution_count
            self._publish("execute_result" if kind == "result" else "display_data", content)

    def _publish(self, kind: str, content: dict[str, Any]) -> None:
        if not self._silent:
            ident = self._topic(kind)
            # Node's output is read outside of the request's context, which has its header.
            self.session.send(self.iopub_socket, kind, content, parent=self._parent, ident=ident)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    IPKernelApp.launch_instance(kernel_class=JavaScriptKernel)
