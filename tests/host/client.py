"""The agent's client, with what only tests do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

from hostruntime.client import host_client
from hostruntime.client.async_host_client import with_output_limit
from hostruntime.client.transport import ExecCollector
from hostruntime.wire.commands import Exec, ExecFrame, ExecResult
from hostruntime.wire.interpreter import CodeFrame, RunCode


class HostClient(host_client.HostClient):
    """The synchronous client that the product uses, and commands."""

    def exec(self, sandbox_id: str, request: Exec) -> ExecResult:
        """``AsyncHostClient.exec_to_completion`` for tests without an event loop."""
        collected, path = ExecCollector(), f"/sandboxes/{sandbox_id}/exec"
        for frame in self._lines(ExecFrame, "POST", path, with_output_limit(request)):
            collected.add(frame)
        return collected.result()

    def code_frames(self, sandbox_id: str, request: RunCode) -> Generator[CodeFrame]:
        """``AsyncHostClient.code_frames`` for tests without an event loop."""
        yield from self._lines(CodeFrame, "POST", f"/sandboxes/{sandbox_id}/code", request)

    def requested_hosts(self, owner: str, *, direct: bool = False) -> Counter[str]:
        """How often each host was requested; with ``direct``, only past the proxy."""
        found: Counter[str] = Counter()
        for use in self.egress_hosts(owner):
            if use.direct or not direct:
                found[use.host] += use.allowed + use.refused + use.unreached
        return found
