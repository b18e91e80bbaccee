"""A command at work in a sandbox while a test does something else."""

from __future__ import annotations

import threading
from contextlib import suppress
from itertools import count
from typing import Any

from hostruntime.errors import HostError
from hostruntime.wire.commands import Exec, ExecResult
from tests.host.agent import eventually
from tests.host.client import HostClient

_numbers = count()


class Command(threading.Thread):
    """A command that has begun by the time this has been made; ``join`` it for what came of it."""

    def __init__(self, host: HostClient, sandbox_id: str, command: str, **options: Any) -> None:
        super().__init__()
        self._host, self._sandbox_id, self._options = host, sandbox_id, options
        mark = f"/workspace/.begun-{next(_numbers)}"
        self._command = f"touch {mark}; {command}"
        self.result: ExecResult | None = None
        self.error: HostError | None = None
        self.start()
        for _ in eventually():
            assert self.error is None, self.error
            with suppress(HostError):
                host.stat(sandbox_id, mark)
                break

    def run(self) -> None:
        try:
            self.result = self._host.exec(self._sandbox_id, Exec(self._command, **self._options))
        except HostError as error:
            self.error = error
