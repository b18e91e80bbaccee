"""The bridge: what speaks Jupyter's protocol with one kernel, both of them inside a sandbox.

Not imported by the project: :mod:`hostruntime.sandbox.interpreter` sends its text to the image's
own Python (3.9 or later), with the listening socket, the first connection and what reads that
as ``listener``, ``connection`` and ``lines``.  It needs pyzmq, which ipykernel
brings along, and nothing else; :mod:`hostruntime.container
.inside_outputs` is sent along.  Each context has a bridge and a kernel of its own, in a control
group of its own: whatever becomes of them, no other context notices.

A connection is one request, a line of JSON, and its answers, a line each:

``start``   find and start a kernel → ``ready``, ``unavailable`` or ``failed``; the first one only
``adopt``   give a Python kernel variables and a directory, before its first run → ``ready`` or
            ``failed``
``run``     run code → any of ``stream``, ``result`` and ``error``, then ``done``

If the connection ends early, or the time is over, the kernel is interrupted; what does not stop
then is killed, and the bridge ends, as it does when the kernel has.  Nothing here protects the
host, which believes none of it: all this is in the hands of whoever owns the sandbox.  The bounds
keep an honest sandbox within what the host accepts, and say what was left out.

The messages are those of https://jupyter-client.readthedocs.io/en/stable/messaging.html (5.3).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from hostruntime.container.inside_outputs import Kept, Outputs, plain_text

# What is larger is not even parsed.
_MAX_CONTENT = 16 * 1024 * 1024
_MAX_REQUEST = 8 * 1024 * 1024
_MAX_KERNEL_FILE = 64 * 1024

_START_SECONDS = 60.0
_REQUEST_SECONDS = 5.0
_FLUSH_SECONDS = 20.0
# When a kernel is interrupted again, and when it is killed.
_AGAIN_SECONDS, _GRACE_SECONDS = 2.0, 4.0
# How long the rest of the output may take once the kernel has answered.
_REST_SECONDS = 0.5
_ASK_SECONDS = 0.05
_TICK_SECONDS = 0.25
_ADOPT_SECONDS = 4.0
_KEPT_PRINT = 4096
_OOM_SCORE_ADJ = "600"

_DELIMITER = b"<IDS|MSG>"
_ALIASES = {"py": "python", "python3": "python", "js": "javascript", "node": "javascript"}
_ALIASES |= {"nodejs": "javascript", "ts": "typescript"}
_KERNEL_DIRECTORIES = (
    f"{sys.prefix}/share/jupyter/kernels",
    "/usr/local/share/jupyter/kernels",
    "/usr/share/jupyter/kernels",
    str(Path("~/.local/share/jupyter/kernels").expanduser()),
)


class Failed(Exception):  # noqa: N818 - an answer to the host
    """The kernel cannot be started; the text says why."""


class Unavailable(Failed):
    """The image has no kernel for the language."""


class Lost(Exception):  # noqa: N818 - an answer to the host
    """The kernel has ended, or had to be; the text says why."""


# Kernels -----------------------------------------------------------------------------------


def kernel_command(language: str, file: str) -> tuple[list[str], bool]:
    """The argv of a kernel for the language, and whether it can use sockets in files.

    Raises Unavailable.
    """
    if language == "python":
        if importlib.util.find_spec("ipykernel") is None:
            raise Unavailable("Its Python has no ipykernel.")
        # What was run is nobody's history but the caller's: no file, and no disk to wait for.
        history = "--HistoryManager.hist_file=:memory:"
        return [sys.executable, "-m", "ipykernel_launcher", "-f", file, history], True
    for directory in _KERNEL_DIRECTORIES:
        with contextlib.suppress(OSError):
            for name in sorted(os.listdir(directory))[:100]:  # noqa: PTH208 - by name
                argv = _argv_of(f"{directory}/{name}/kernel.json", language)
                if argv:
                    return [each.replace("{connection_file}", file) for each in argv], False
    raise Unavailable(f"It has no Jupyter kernel for {language}.")


def _argv_of(path: str, language: str) -> list[str]:
    """The argv of a kernel specification, if it is one for the language; else nothing."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - bounded
            spec = json.loads(file.read(_MAX_KERNEL_FILE))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(spec, dict) or not isinstance(spec.get("argv"), list):
        return []
    argv, spoken = spec["argv"], spec.get("language")
    usable = argv and all(isinstance(each, str) and "\0" not in each for each in argv)
    if not usable or not isinstance(spoken, str):
        return []
    return argv if _ALIASES.get(spoken.lower(), spoken.lower()) == language else []


class Kernel:
    """A kernel's process and the sockets to it."""

    def __init__(self, language: str, cwd: str) -> None:
        self.directory = tempfile.mkdtemp(prefix="orkestr-kernel-")
        self.key = uuid.uuid4().hex.encode()
        self.session = uuid.uuid4().hex
        self.printed = b""
        self.kept = Kept()
        connection_file = f"{self.directory}/connection.json"
        argv, in_files = kernel_command(language, connection_file)
        self.endpoints = self._write_connection(connection_file, in_files)
        try:
            self.process = subprocess.Popen(
                argv,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise Failed(f"The kernel's program cannot be run: {error}.") from error
        # It is the one that uses memory: better that it is killed than this.
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.process.pid}/oom_score_adj").write_text(_OOM_SCORE_ADJ)
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()
        os.set_blocking(self.output, False)
        # Not before: the kernel starts meanwhile.
        self.zmq = importlib.import_module("zmq")
        self.context = self.zmq.Context()
        self.shell = self._socket(self.zmq.DEALER, "shell")
        self.iopub = self._socket(self.zmq.SUB, "iopub")
        self.iopub.setsockopt(self.zmq.SUBSCRIBE, b"")
        self.poller = self.zmq.Poller()
        for each in (self.shell, self.iopub, self.output):
            self.poller.register(each, self.zmq.POLLIN)
        with contextlib.suppress(OSError, AttributeError):
            self.poller.register(os.pidfd_open(self.process.pid), self.zmq.POLLIN)

    def _write_connection(self, path: str, in_files: bool) -> dict[str, str]:
        names = ("shell", "iopub", "stdin", "control", "hb")
        ports = list(range(1, len(names) + 1)) if in_files else _free_ports(len(names))
        ip = f"{self.directory}/socket" if in_files else "127.0.0.1"
        transport, colon = ("ipc", "-") if in_files else ("tcp", ":")
        fields: dict[str, Any] = {f"{name}_port": port for name, port in zip(names, ports)}  # noqa: B905
        fields |= {"transport": transport, "ip": ip, "key": self.key.decode()}
        fields["signature_scheme"] = "hmac-sha256"
        Path(path).write_text(json.dumps(fields))
        return {name: f"{transport}://{ip}{colon}{port}" for name, port in zip(names, ports)}  # noqa: B905 - new in Python 3.10

    def _socket(self, kind: int, name: str) -> Any:
        made = self.context.socket(kind)
        made.setsockopt(self.zmq.LINGER, 0)
        made.setsockopt(self.zmq.RECONNECT_IVL, 5)
        made.connect(self.endpoints[name])
        return made

    def send(self, kind: str, content: dict[str, Any]) -> str:
        """Send a request on the shell socket; return its id."""
        message_id = uuid.uuid4().hex
        header = {"msg_id": message_id, "session": self.session, "username": "orkestr"}
        header |= {"date": _now(), "msg_type": kind, "version": "5.3"}
        parts = [json.dumps(each).encode() for each in (header, {}, {}, content)]
        signature = hmac.new(self.key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        self.shell.send_multipart([_DELIMITER, signature, *parts])
        return message_id

    def receive(self, source: Any) -> tuple[str, str, dict[str, Any], bool] | None:
        """The next message there is: its kind, whose answer it is, its content, whether all of it.

        None if there is none now, or it cannot be read.
        """
        try:
            frames = source.recv_multipart(self.zmq.NOBLOCK)
            start = frames.index(_DELIMITER)
            header, parent = (json.loads(frames[start + number]) for number in (2, 3))
            whole = len(frames[start + 5]) <= _MAX_CONTENT
            content = json.loads(frames[start + 5]) if whole else {}
            kind, parent_id = str(header["msg_type"]), str(parent.get("msg_id", ""))
        except (self.zmq.ZMQError, ValueError, KeyError, IndexError, AttributeError):
            return None
        except (RecursionError, TypeError):
            return None
        return kind, parent_id, content if isinstance(content, dict) else {}, whole

    def wait(self, seconds: float) -> set[Any]:
        """Wait for something to happen; the sockets and descriptors that are ready."""
        ready = dict(self.poller.poll(max(seconds, 0) * 1000))
        if self.output in ready:
            self._read_output()
        if self.process.poll() is not None and not {self.shell, self.iopub} & set(ready):
            raise Lost(self.why_it_ended())
        return set(ready)

    def _read_output(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(self.output, 65536)
        if not data:
            self.poller.unregister(self.output)
        self.printed = (self.printed + data)[-_KEPT_PRINT:]

    def wait_until_ready(self) -> None:
        """Wait until it answers, and its output arrives here.  Raises Failed."""
        deadline, asked, answered, heard = time.monotonic() + _START_SECONDS, 0.0, False, False
        try:
            while not (answered and heard):
                if time.monotonic() > deadline:
                    raise Failed(f"The kernel did not answer within {_START_SECONDS:.0f} seconds.")
                if not asked or (answered and time.monotonic() > asked + _ASK_SECONDS):
                    self.send("kernel_info_request", {})
                    asked = time.monotonic()
                ready = self.wait(_ASK_SECONDS if answered else _TICK_SECONDS)
                answered = (self.shell in ready and bool(self.receive(self.shell))) or answered
                heard = (self.iopub in ready and bool(self.receive(self.iopub))) or heard
        except Lost as error:
            raise Failed(str(error)) from error
        # Kernels greet whoever starts them.
        self.printed = b""

    def keep_output(self) -> None:
        """Keep what threads have printed since the last run, and drop everything else."""
        while (message := self.receive(self.iopub)) is not None:
            kind, _, content, whole = message
            if kind == "stream":
                self.kept.add(content, whole)

    def interrupt(self) -> None:
        """Interrupt what it runs, as Ctrl-C would."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Kill it, with what it has in its process group."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self.process.kill()

    def why_it_ended(self) -> str:
        """A sentence."""
        code = self.process.poll()
        if code is not None and code < 0:
            cause = f"killed by signal {-code}"
            if code == -signal.SIGKILL:
                cause += ", most likely because the sandbox ran out of memory"
        else:
            cause = f"it ended with status {code}"
        said = plain_text(self.printed.decode(errors="replace")).strip()[-1500:]
        return f"The kernel has ended ({cause})." + (f" It said: {said}" if said else "")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())


# Serving the host -----------------------------------------------------------------------------


class Peer:
    """The connection of one request, written without waiting."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.gone = False
        self._pending = bytearray()
        connection.settimeout(0)

    def send(self, line: dict[str, Any]) -> None:
        """Send a line, as soon as it is read."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        self._pending += text.encode("utf-8", "replace") + b"\n"
        self.flush()

    @property
    def is_behind(self) -> bool:
        """Whether something is not sent yet."""
        return bool(self._pending) and not self.gone

    def flush(self) -> None:
        """Send as much as is read."""
        try:
            while self._pending and not self.gone:
                sent = self.connection.send(self._pending)
                del self._pending[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True

    def check(self) -> None:
        """Notice that the host has closed it; it sends nothing more."""
        try:
            self.gone = not self.connection.recv(4096) or self.gone
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True

    def finish(self) -> None:
        """Send what is left, and close."""
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self.is_behind and time.monotonic() < deadline:
            select.select([], [self.connection], [], _TICK_SECONDS)
            self.flush()
        # Somebody may have copies of it, or files of them.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class Run:
    """One run of code, until the kernel has finished with it."""

    def __init__(self, kernel: Kernel, peer: Peer, request: dict[str, Any]) -> None:
        self.kernel, self.peer, self.outputs = kernel, peer, Outputs()
        self.silent = request.get("silent") is True
        self.started = time.monotonic()
        self.deadline = self.started + float(request["seconds"])
        self.code = str(request["code"])
        self.interrupted_at: float | None = None
        self.timed_out = False
        self.answered_at: float | None = None
        self.idle = False
        self.succeeded = False
        self.count: int | None = None
        self._interrupts = 0

    def perform(self) -> None:
        """Run it.  Raises Lost."""
        self.kernel.keep_output()
        for line in () if self.silent else self.kernel.kept.take(self.outputs):
            self.peer.send(line)
        content: dict[str, Any] = {"code": self.code, "silent": self.silent}
        content |= {"store_history": not self.silent, "user_expressions": {}}
        # There is never another one behind it to be given up.
        content |= {"allow_stdin": False, "stop_on_error": False}
        self.id = self.kernel.send("execute_request", content)
        poller, zmq = self.kernel.poller, self.kernel.zmq
        descriptor = self.peer.connection.fileno()
        poller.register(descriptor, zmq.POLLIN)
        try:
            while not self._is_finished():
                writing = zmq.POLLOUT if self.peer.is_behind else 0
                poller.modify(descriptor, zmq.POLLIN | writing)
                ready = self.kernel.wait(self._patience())
                if descriptor in ready:
                    self.peer.flush()
                    self.peer.check()
                self._read()
                self._mind_the_time()
                if self.peer.gone:
                    # Nobody to hear from; what is left of its output is still read.
                    poller.unregister(descriptor)
                    descriptor = -1
                    self._finish_alone()
                    return
        finally:
            if descriptor != -1:
                poller.unregister(descriptor)

    def _finish_alone(self) -> None:
        while not self._is_finished():
            self.kernel.wait(_TICK_SECONDS)
            self._read()
            self._mind_the_time()

    def _is_finished(self) -> bool:
        if self.answered_at is None:
            return False
        return self.idle or time.monotonic() > self.answered_at + _REST_SECONDS

    def _patience(self) -> float:
        if self.answered_at is not None or self.interrupted_at is not None:
            return _ASK_SECONDS
        return min(max(self.deadline - time.monotonic(), 0.0), 5.0)

    def _read(self) -> None:
        while (message := self.kernel.receive(self.kernel.iopub)) is not None:
            kind, parent, content, whole = message
            if parent != self.id and kind != "stream":
                continue
            if parent != self.id and self.silent:
                self.kernel.kept.add(content, whole)
            elif kind == "status":
                self.idle = self.idle or content.get("execution_state") == "idle"
            elif kind == "execute_input":
                self._note_count(content)
            elif not self.silent:
                for line in self.outputs.lines(kind, content, whole):
                    self.peer.send(line)
        while (message := self.kernel.receive(self.kernel.shell)) is not None:
            kind, parent, content, whole = message
            if parent == self.id and kind == "execute_reply":
                self._answered(content, whole)

    def _answered(self, content: dict[str, Any], whole: bool) -> None:
        self.answered_at = time.monotonic()
        self._note_count(content)
        self.succeeded = content.get("status") == "ok"
        failed = content.get("status") == "error" or not whole
        if failed and self.outputs.error is None and self.idle:
            self.peer.send(self.outputs.failure(content, whole))

    def _note_count(self, content: dict[str, Any]) -> None:
        count = content.get("execution_count")
        self.count = count if isinstance(count, int) else self.count

    def _mind_the_time(self) -> None:
        now = time.monotonic()
        if self.answered_at is not None:
            return
        if self.interrupted_at is None:
            self.timed_out = now > self.deadline and not self.peer.gone
            if self.timed_out or self.peer.gone:
                self.interrupted_at, self._interrupts = now, 1
                self.kernel.interrupt()
            return
        if now > self.interrupted_at + _GRACE_SECONDS:
            self.kernel.kill()
            raise Lost("The code ran past its time, and did not stop when it was interrupted.")
        if now > self.interrupted_at + _AGAIN_SECONDS * self._interrupts:
            self._interrupts += 1
            self.kernel.interrupt()

    def done(self, lost: str = "") -> dict[str, Any]:
        """The last line."""
        return {
            "kind": "done",
            "execution_count": self.count,
            "duration_ms": round((time.monotonic() - self.started) * 1000),
            "interrupted": self.timed_out,
            "lost": lost,
            "truncated": self.outputs.truncated,
        }


def start(peer: Peer, request: dict[str, Any]) -> Kernel | None:
    """Start the kernel, and have it run what prepares it; None if that failed."""
    language = str(request.get("language"))
    try:
        kernel = Kernel(_ALIASES.get(language, language), str(request.get("cwd")))
        try:
            kernel.wait_until_ready()
            if language == "python" and request.get("setup"):
                code = {"code": request["setup"], "seconds": _START_SECONDS, "silent": True}
                with contextlib.suppress(KeyError):
                    Run(kernel, peer, code).perform()
        except (Failed, Lost):
            kernel.kill()
            shutil.rmtree(kernel.directory, ignore_errors=True)
            raise
    except Unavailable as error:
        peer.send({"kind": "unavailable", "message": str(error)})
    except (Failed, Lost, OSError, ImportError) as error:
        peer.send({"kind": "failed", "message": str(error)[:2000]})
    else:
        peer.send({"kind": "ready"})
        return kernel
    return None


def adopt(request: dict[str, Any]) -> dict[str, Any]:
    """The request to run what gives a kernel its variables, and leaves nothing behind there."""
    environment = {str(name): str(value) for name, value in request["environment"].items()}
    code = (
        f"__import__('os').environ.update({environment!r})\n"
        f"__import__('os').chdir({str(request['cwd'])!r})"
    )
    return {"code": code, "seconds": _ADOPT_SECONDS, "silent": True}


def serve_one(kernel: Kernel, connection: socket.socket) -> None:
    """Serve the request of one connection.  Raises Lost once the kernel has ended."""
    connection.settimeout(_REQUEST_SECONDS)
    try:
        with connection.makefile("rb") as lines:
            request = json.loads(lines.readline(_MAX_REQUEST))
        adopting = request.get("op") == "adopt"
        peer = Peer(connection)
        run = Run(kernel, peer, adopt(request) if adopting else request)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        connection.close()
        return
    peer.check()
    try:
        # Who has left meanwhile does not want it run.
        if not peer.gone:
            run.perform()
    except Lost as error:
        peer.send(run.done(str(error)))
        raise
    else:
        peer.send({"kind": "ready" if run.succeeded else "failed"} if adopting else run.done())
    finally:
        peer.finish()


def main(listener: socket.socket, connection: socket.socket, lines: Any) -> None:
    """Serve until the kernel has ended."""
    null = os.open(os.devnull, os.O_RDWR)
    # The kernel must not have the listening socket, nor what reads this process's output wait.
    listener = socket.socket(fileno=os.dup(listener.detach()))
    for number in range(3):
        os.dup2(null, number)
    # Before the connection no longer waits: this is sent separately, and may not be there yet.
    request = json.loads(lines.readline(_MAX_REQUEST))
    peer = Peer(connection)
    kernel = start(peer, request)
    peer.finish()
    if kernel is None:
        return
    try:
        kernel.poller.register(listener.fileno(), kernel.zmq.POLLIN)
        while True:
            if listener.fileno() in kernel.wait(60.0):
                kernel.poller.unregister(listener.fileno())
                serve_one(kernel, listener.accept()[0])
                kernel.poller.register(listener.fileno(), kernel.zmq.POLLIN)
            kernel.keep_output()
    except Lost:
        kernel.kill()
    finally:
        shutil.rmtree(kernel.directory, ignore_errors=True)


if __name__ == "__main__":
    main(*(globals()[name] for name in ("listener", "connection", "lines")))
