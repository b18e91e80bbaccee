"""The product on a guest, as its operator drives it: `make run`, `make doctor`, `make down`."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import httpx
from orkestr import OrkestrClient

from tests.vm.guest import Guest
from tests.vm.image import CLONE
from tests.vm.places import VmError

PORT = 8000
RUN_SECONDS = 3600.0
DOWN_SECONDS = 1800.0
# An emulated machine answers a call in the time that a real one takes for a hundred.
CALL_SECONDS = 900.0
TREE = f"/{CLONE}"
OUTPUT, BEGAN = "/tmp/run.log", "/tmp/run.began"
ENDED = "make run ended with"
SERVING = "the console serves"


class Console:
    """The clone in the person's home, and the console that was last started from it."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def doctor(self) -> str:
        """What `make doctor` says; AssertionError unless every line of it is ok."""
        said = self.guest.person(f"cd {TREE} && make doctor", check=False)
        poor = [line for line in said.out.splitlines() if re.match(r"\s*(warn|fail) ", line)]
        assert said.status == 0, str(said)
        assert not poor, said.out
        assert "This machine is ready." in said.out, str(said)
        return said.out

    def start(self, *, as_root: bool = False) -> str:
        """`make run` from a login session that then ends; what it said until it served.

        AssertionError when it ends, or warns of anything, a red self-check among it.
        """
        run = self.guest.root if as_root else self.guest.person
        # A file of root's in /tmp is closed to others even when theirs (fs.protected_regular).
        self.guest.root(f"rm -f {OUTPUT}; touch {BEGAN}")
        # As one starts it who will log out: in tmux, or so.
        command = shlex.quote(f'make run; echo "{ENDED} $?"')
        run(f"cd {TREE} && (setsid nohup sh -c {command} >{OUTPUT} 2>&1 </dev/null &)")
        deadline = time.monotonic() + RUN_SECONDS
        while not (said := self._output()).serving:
            assert ENDED not in said.text, f"`make run` ended:\n{said.text[-3000:]}"
            assert time.monotonic() < deadline, f"not served yet:\n{said.text[-3000:]}"
            time.sleep(5)
        warnings = [line for line in said.text.splitlines() if re.match(r"\s*! ", line)]
        assert not warnings, said.text[-4000:]
        assert "self-check" in said.text, said.text[-4000:]
        return said.text

    def errors(self) -> list[str]:
        """What the agent, the worker and the web process logged as an error, so far."""
        logs = f"{TREE}/var/log/agent.log {TREE}/var/log/web.log {TREE}/var/log/worker.log"
        found = self.guest.root(f"grep -hE ' (ERROR|CRITICAL) ' {logs}", check=False)
        return found.out.splitlines()

    def stop(self) -> None:
        """What Ctrl-C does, unless it has stopped already. AssertionError if it does not."""
        self.guest.root(f"kill -INT $(cat {TREE}/var/run/up.lock)", check=False)
        deadline = time.monotonic() + DOWN_SECONDS
        while self.is_running():
            assert time.monotonic() < deadline, "the console does not stop"
            time.sleep(2)

    def down(self) -> str:
        """`make down`; AssertionError unless it says that all is released."""
        said = self.guest.person(f"cd {TREE} && make down", timeout=DOWN_SECONDS)
        assert "containers, mounts and networks released" in said.out, str(said)
        return said.out

    def is_running(self) -> bool:
        """Whether a `make run` still does."""
        # The brackets keep the pattern from finding the shell that looks for it.
        return self.guest.root("pgrep -f '[m]anage.py up'", check=False).status == 0

    def leftovers(self) -> list[str]:
        """Everything of the product that is on the machine, but for its files."""
        return cast("list[str]", self._seen("leftovers", TREE))

    def container(self, sandbox: str) -> dict[str, Any]:
        """How the kernel holds a running sandbox (:mod:`tests.vm.seen`). Raises VmError."""
        return cast("dict[str, Any]", self._seen("container", sandbox))

    def mover(self, sandbox: str) -> dict[str, Any]:
        """The same of a process that moves its files, which somebody must have begun."""
        return cast("dict[str, Any]", self._seen("mover", sandbox))

    def _seen(self, *question: str) -> object:
        program = f"cd {TREE} && .venv/bin/python -B -m tests.vm.seen {shlex.join(question)}"
        return json.loads(self.guest.root(program).out)

    @contextmanager
    def clients(self) -> Iterator[Clients]:
        """The API's clients here, through a tunnel to the console there."""
        credentials = json.loads(self.guest.root(f"cat {TREE}/var/run/console.json").out)
        with self.guest.tunnel(PORT) as port:
            url = f"http://127.0.0.1:{port}"
            with Clients(url, credentials["api_key"]) as clients:
                yield clients

    def _output(self) -> Started:
        # One from before a reboot is there until the new start has got so far as to remove it.
        served = f"test {TREE}/var/run/ready -nt {BEGAN}"
        said = self.guest.root(f"cat {OUTPUT}; {served} && echo {SERVING}", check=False)
        return Started(said.out, serving=SERVING in said.out)


@dataclass(frozen=True)
class Started:
    """What `make run` has said so far, and whether the console serves."""

    text: str
    serving: bool


class Clients:
    """The official SDK's client and a plain one, signed in as the demo team."""

    def __init__(self, url: str, api_key: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self.sdk = OrkestrClient(api_key=api_key, base_url=url, timeout=CALL_SECONDS)
        self.http = httpx.Client(
            base_url=url, headers=headers, timeout=CALL_SECONDS, trust_env=False
        )

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.sdk.close()

    def get(self, path: str) -> dict[str, Any]:
        """The record at a path of the API. Raises VmError."""
        answer = self.http.get(path)
        if answer.is_error:
            raise VmError(f"GET {path} answered {answer.status_code}: {answer.text}")
        found: dict[str, Any] = answer.json()
        return found
