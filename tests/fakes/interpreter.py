"""The part of the host agent in memory that is about the code interpreter."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from hostruntime.errors import ContainerGone, ContextNotFound, HostError
from hostruntime.host.quotas import RunningCommands
from hostruntime.wire.interpreter import (
    CodeFrame,
    CodeResult,
    ContextInfo,
    CreateContext,
    RunCode,
)
from hostruntime.wire.sandboxes import SandboxInfo

if TYPE_CHECKING:
    from tests.fakes.host import FakeSandbox


class FakeInterpreter:
    """Contexts, and what a test says that code brings forth."""

    lock: threading.Condition
    running: RunningCommands
    _up: Callable[[], None]
    _running: Callable[[str], FakeSandbox]
    sandbox: Callable[[str], SandboxInfo]

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, dict[str, ContextInfo]] = defaultdict(dict)
        self.coded: list[RunCode] = []
        # By the code; an error among them is raised.
        self.code: dict[str, list[CodeFrame | HostError]] = {}
        self.interrupted: list[str] = []
        # What the next start of a kernel raises.
        self.kernel_fails: HostError | None = None

    def create_context(self, sandbox_id: str, request: CreateContext) -> ContextInfo:
        """As the client."""
        self._running(sandbox_id)
        failure, self.kernel_fails = self.kernel_fails, None
        if failure is not None:
            raise failure
        info = ContextInfo(request.id, request.language, request.cwd, time.time())
        return self.kernels[sandbox_id].setdefault(request.id, info)

    def contexts(self, sandbox_id: str) -> list[ContextInfo]:
        """As the client."""
        self._up()
        if self.sandbox(sandbox_id).state != "running":
            raise ContainerGone("The sandbox is not running.")
        return list(reversed(self.kernels[sandbox_id].values()))

    def restart_context(self, sandbox_id: str, context_id: str) -> ContextInfo:
        """As the client."""
        self._running(sandbox_id)
        return self._context(sandbox_id, context_id)

    def remove_context(self, sandbox_id: str, context_id: str) -> None:
        """As the client."""
        self._running(sandbox_id)
        del self.kernels[sandbox_id][self._context(sandbox_id, context_id).id]

    async def code_frames(self, sandbox_id: str, request: RunCode) -> AsyncIterator[CodeFrame]:
        """What ``code`` has for it; without that, it is its own result."""
        context = request.context_id or "default"
        with self.running.track(request.quota):
            self._running(sandbox_id)
            self.coded.append(request)
            if request.context_id is not None:
                self._context(sandbox_id, context)
            told = False
            result = CodeResult(text=request.code)
            try:
                for frame in self.code.get(
                    request.code,
                    [
                        CodeFrame("started", context_id=context),
                        CodeFrame("result", result=result),
                        CodeFrame("done", context_id=context, execution_count=1, duration_ms=3),
                    ],
                ):
                    if isinstance(frame, HostError):
                        raise frame
                    yield frame
                told = True
            finally:
                if not told:
                    self.interrupted.append(request.code)

    def _context(self, sandbox_id: str, context_id: str) -> ContextInfo:
        try:
            return self.kernels[sandbox_id][context_id]
        except KeyError:
            raise ContextNotFound(f"There is no context {context_id}.") from None
